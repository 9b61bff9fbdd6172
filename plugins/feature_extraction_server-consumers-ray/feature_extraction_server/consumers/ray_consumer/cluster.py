"""What the driver asks of Ray: deploys models as applications of Ray Serve, calls them, and watches them.

Every method may be called from any thread. Ray itself is imported when the first model starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

from PIL import Image

from feature_extraction_server.consumers.ray_consumer import settings
from feature_extraction_server.consumers.ray_consumer.replica import END, FAILED, PROTOCOL, was_running
from feature_extraction_server.core import pixels
from feature_extraction_server.core.errors import ModelError, ModelLoadFailed, ModelUnavailable
from feature_extraction_server.core.plugins import Registry

logger = logging.getLogger(__name__)

DEPLOYMENT: Final = "model"
#: How many replicas may die of a call.
_MAX_DEATHS: Final = 3
#: How often a call is sent at most where replicas die, of whatever.
_MAX_TRIES: Final = 10
#: How often a model that has started is asked at most what it has loaded.
_MAX_START_TRIES: Final = 3
_POLL_S: Final = 1.0
_CHECK_S: Final = 0.1  # between looks at whether somebody still waits
_ANSWER_TIMEOUT_S: Final = 10.0  # of Ray Serve's controller
_CONNECT_TIMEOUT_S: Final = 3.0
_DELETE_TIMEOUT_S: Final = 60.0
_RETRY_AFTER_S: Final = 5.0  # where what is missing may come by itself
#: How often a replica that is to end looks whether it has answered all.
_DRAIN_CHECK_S: Final = 0.2
#: Calls that one replica may have at a time, those that wait included: of all servers together.
_MAX_ONGOING: Final = 64
#: Replicas that are busy for more of their time than this make Ray Serve start more. A server has no more calls under
#: way than there are replicas, so that what waits in its queue does not count.
_TARGET_ONGOING: Final = 0.8
_REASON: Final = re.compile(re.escape(FAILED) + r"(.*?)" + re.escape(END))


class App:
    """A model on the cluster, as far as this server uses it. ``changed`` guards what the watch keeps up to date."""

    def __init__(
        self, name: str, model: str, configuration: str, handle: Any, provenance: dict[str, str | None]
    ) -> None:
        self.name = name
        self.model = model
        self.configuration = configuration
        self.handle = handle
        self.provenance = provenance
        self.changed = threading.Condition()
        self.replicas: list[dict[str, Any]] = []
        self.gone = False

    def take(self, details: dict[str, Any] | None) -> None:
        """Take note of what Ray Serve tells of it; None: it has gone, for good. What has its name later is another."""
        replicas = [] if details is None else _replicas(details)
        with self.changed:
            if not self.gone and (details is None or self.replicas != replicas):
                self.gone, self.replicas = details is None, replicas
                self.changed.notify_all()


class Cluster:
    """The Ray cluster that RAY_ADDRESS names, or one on this machine that ends with this object.

    Args:
        on_loss: called when Ray Serve was shut down there. This process finds no other one.
    """

    def __init__(self, registry: Registry, on_loss: Callable[[], None]) -> None:
        self._registry = registry
        self._on_loss = on_loss
        self._lock = threading.Lock()
        self._connected = False
        self._closing = threading.Event()
        self._answers = True  # whether Ray Serve's controller did, when it was last asked
        self._folder: str | None = None  # of a cluster of our own
        self._apps: dict[str, App] = {}

    def start(
        self, model: str, grace_s: float, is_wanted: Callable[[], bool]
    ) -> tuple[dict[str, str | None], str, list[dict[str, Any]]]:
        """Find a model on the cluster or deploy it, and wait until it has a replica.

        Args:
            grace_s: how long its replicas may take to finish what they have accepted when it is stopped.

        Returns:
            Where its answers come from, this node's address, and the replicas.

        Raises:
            ModelLoadFailed: with the reason, and the node where it happened.
            ModelUnavailable: no cluster answers, or none of its nodes has room: both may pass.
        """
        self._connect()
        import ray

        name = f"{settings.general('RAY_APP_PREFIX')}_{model}"
        configuration = self._configuration(model)
        details, provenance = self._wait_for_provenance(name, model, grace_s, configuration, is_wanted)
        app = App(name, model, configuration, _handle(name).options(method_name="call"), provenance)
        app.take(details)
        self._apps[model] = app
        return provenance, ray.util.get_node_ip_address(), app.replicas

    def call(
        self,
        model: str,
        function: str,
        positional: tuple[Any, ...],
        arguments: dict[str, Any],
        id: str | None,
        is_wanted: Callable[[], bool],
    ) -> tuple[bool, Any]:
        """Run a model's function on some replica; where that dies, on another.

        Returns:
            Whether it succeeded, and its result or its error.

        Raises:
            ModelUnavailable: too many replicas died of it, or the model is no longer on the cluster.
        """
        import ray
        from ray.serve.exceptions import RayServeException

        app = self._apps[model]
        n_deaths = 0
        for n_tries in range(1, _MAX_TRIES + 1):
            # All calls at a replica die with it, those too that only waited there. The next time, it is noted.
            mark = secrets.token_hex(8) if n_tries > 1 else None
            try:
                response = app.handle.remote(app.configuration, function, positional, arguments, id, mark)
                succeeded, answer, provenance = self._wait(app, response, is_wanted)
            except ray.exceptions.RayTaskError as error:
                return False, ModelError(f"the model {model} failed on the Ray cluster: {error.cause}")
            except (ray.exceptions.RayError, RayServeException) as error:
                logger.warning("A replica of the model %s failed (try %d): %s", model, n_tries, error)
                if app.gone:
                    raise _was_stopped(model) from None
                if not self._answers:
                    raise _head_is_silent() from None
                reason = str(error).strip().rpartition("\n")[2]
                # Where the head does not say, nobody is blamed: that would be for good.
                n_deaths += mark is None or was_running(mark) is True
            else:
                if succeeded is None:
                    app.take(None)
                    raise _was_stopped(model)
                if _differ(provenance, app.provenance):
                    raise ModelUnavailable(
                        f"a replica of the model {model} has loaded something else: {provenance}, not {app.provenance}"
                    )
                return succeeded, answer
            if n_deaths == _MAX_DEATHS:
                raise ModelUnavailable(
                    f"{_MAX_DEATHS} replicas of the model {model} died of this request, the last one: {reason}"
                )
            time.sleep(_CHECK_S * (n_tries - 1))  # until it is known which replicas are dead
        died = f"{_MAX_TRIES} replicas of the model {model} died, the last one: {reason}"
        raise ModelUnavailable(died, retry_after=_RETRY_AFTER_S)  # most of them not of this request

    def watch(self, model: str, tell: Callable[[list[dict[str, Any]]], None]) -> None:
        """Tell the replicas whenever there are others, until the model is no longer on the cluster, or let go of."""
        app = self._apps[model]
        told: list[dict[str, Any]] | None = None

        def has_news() -> bool:
            return app.gone or app.replicas != told

        while not app.gone:
            with app.changed:
                app.changed.wait_for(has_news, _POLL_S)
                replicas = app.replicas
            if replicas != told and not app.gone:
                tell(replicas)
                told = replicas

    def stop(self, model: str, for_all: bool) -> None:
        """Let go of a model, and delete it ``for_all`` servers. On a cluster of our own there are no others."""
        app = self._apps.pop(model)
        try:
            if (for_all or self._folder is not None) and not app.gone:
                self._delete(app.name, app.configuration)
        finally:
            app.take(None)

    def close(self) -> None:
        """Leave the cluster, and end it where it is our own."""
        self._closing.set()
        if self._connected and self._folder is not None:
            import ray

            ray.shutdown()
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # Connecting

    def _connect(self) -> None:
        with self._lock:
            if not self._connected:
                connected: Future[None] = Future()
                threading.Thread(target=self._run, args=(connected,), name="cluster", daemon=True).start()
                connected.result()
                self._connected = True

    def _run(self, connected: Future[None]) -> None:
        """Connect and watch, in one thread: Linux kills what Ray starts when the thread that started it ends."""
        try:
            self._init()
        except BaseException as error:
            connected.set_exception(error)
        else:
            connected.set_result(None)
            self._poll()
            if not self._closing.is_set():
                self._on_loss()
            threading.Event().wait()  # for the end of the process: ``close`` gives them time to end by themselves

    def _init(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A thread that asks Ray after the end of the cluster would otherwise start another one.
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        address = settings.general(settings.ADDRESS)
        if address is None:
            self._prepare_own_cluster()
        elif address != "auto":
            _require_listener(address)
        try:
            import ray
            from ray import serve
            from ray.serve.context import _get_global_client
        except ImportError as error:
            raise ModelLoadFailed(
                f"the package ray[serve], which the ray_consumer needs, is not installed ({error})"
            ) from None
        options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": None, "address": address}
        if address is None:
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": self._folder}
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            # Ray has sent what is in the folder when it returns.
            with tempfile.TemporaryDirectory(prefix="fes-modules-") as staging:
                if settings.general("RAY_SHIP_PLUGINS"):
                    options["runtime_env"] = {"py_modules": [_collect_modules(staging)]}
                given = {key: value for key, value in options.items() if value is not None}
                ray.init(**given, logging_level="warning")
            serve.start(proxy_location="Disabled")
            self._controller = _get_global_client()._controller
        except Exception as error:
            logger.exception("The Ray cluster cannot be used")
            ray.shutdown()
            self._remove_folder()
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # Ray tells of what passes, a head that is starting for example, by errors of all types, and so of the rest.
            is_final = isinstance(error, ValueError) or "version mismatch" in reason.lower()
            raise (ModelLoadFailed if is_final else ModelUnavailable)(
                f"the Ray cluster {address or 'on this machine'} cannot be used: {reason}", retry_after=_RETRY_AFTER_S
            ) from None
        ray.util.register_serializer(Image.Image, serializer=pixels.pack, deserializer=pixels.unpack)

    def _prepare_own_cluster(self) -> None:
        """Have Ray keep to this machine, to a folder of its own, and to those who have this process's token.

        Ray reads these variables when it is imported.
        """
        self._folder = tempfile.mkdtemp(prefix="fes-ray-")
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface, but for replicas' ports
            # Processes for work that may come, one a core: the models' come in any case, and no others.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }

    # Deploying

    def _wait_for_provenance(
        self, name: str, model: str, grace_s: float, configuration: str, is_wanted: Callable[[], bool]
    ) -> tuple[dict[str, Any], dict[str, str | None]]:
        for n_tries in range(1, _MAX_START_TRIES + 1):
            details = self._wait_for_replica(name, model, grace_s, configuration, is_wanted)
            try:
                return details, _handle(name).provenance.remote().result(timeout_s=_ANSWER_TIMEOUT_S)
            except Exception as error:  # by many types Ray tells what passes: a dead replica, a stop, a busy node
                logger.warning("The model %s has started, but does not answer (try %d): %s", model, n_tries, error)
                reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
            time.sleep(_POLL_S)
        raise ModelUnavailable(
            f"the model {model} has started, but does not answer: {reason}", retry_after=_RETRY_AFTER_S
        )

    def _wait_for_replica(
        self, name: str, model: str, grace_s: float, configuration: str, is_wanted: Callable[[], bool]
    ) -> dict[str, Any]:
        deployed = woken = False
        waiting_since = time.monotonic()
        try:
            while is_wanted():
                app = self._details().get(name)
                details = app and app["deployments"].get(DEPLOYMENT)
                status = app and _word(app["status"])
                if app is None or (status == "deploy_failed" and not deployed):
                    self._deploy(name, model, grace_s, configuration)
                    deployed = True
                elif status == "deploy_failed":
                    raise ModelLoadFailed(_reason(details or app))
                elif status != "deleting" and details:
                    self._compare(model, configuration, details)
                    if any(replica["state"] == "running" for replica in _replicas(details)):
                        return dict(details)
                    if status == "running" and not details["replicas"] and not woken:
                        # There may be none (RAY_MIN_REPLICAS=0), until somebody asks for one.
                        _handle(name).provenance.remote()
                        woken = True
                    if any(replica.get("node_id") for replica in details["replicas"]):
                        waiting_since = time.monotonic()  # one has found its node and is loading
                    elif time.monotonic() - waiting_since > settings.general("RAY_PLACEMENT_TIMEOUT"):
                        raise ModelUnavailable(_no_room(model), retry_after=_RETRY_AFTER_S)
                time.sleep(_CHECK_S)
            raise ModelUnavailable(f"the model {model} was stopped while it was starting")
        except BaseException:
            if deployed:
                with suppress(Exception):  # another server may have done it
                    self._delete(name, configuration)
            raise

    def _deploy(self, name: str, model: str, grace_s: float, configuration: str) -> None:
        from ray import cloudpickle, serve
        from ray.serve.config import RequestRouterConfig

        from feature_extraction_server.consumers.ray_consumer import replica

        cloudpickle.register_pickle_by_value(replica)
        demand = settings.demand(model)
        scaling: dict[str, Any] = {"num_replicas": demand.min_replicas}
        if demand.min_replicas != demand.max_replicas:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": demand.min_replicas,
                    "initial_replicas": max(1, demand.min_replicas),
                    "max_replicas": demand.max_replicas,
                    "target_ongoing_requests": _TARGET_ONGOING,
                }
            }
        deployment = serve.deployment(
            replica.Replica,
            name=DEPLOYMENT,
            ray_actor_options={
                "num_cpus": demand.num_cpus,
                "num_gpus": demand.num_gpus,
                "resources": demand.resources,
            },
            max_ongoing_requests=_MAX_ONGOING,
            max_constructor_retry_count=1,
            graceful_shutdown_timeout_s=grace_s,
            graceful_shutdown_wait_loop_s=_DRAIN_CHECK_S,
            health_check_period_s=2,
            user_config={"configuration": configuration},
            request_router_config=RequestRouterConfig(
                request_router_class="feature_extraction_server.consumers.ray_consumer.router.LeastBusyRouter"
            ),
            logging_config={"enable_access_log": False},
            **scaling,
        )
        # Servers that deploy the same at the same time must not replace each other's replicas.
        deployment._version = hashlib.blake2b(configuration.encode(), digest_size=8).hexdigest()
        target = deployment.bind(
            model, self._given(model), logging.getLogger("feature_extraction_server").level, grace_s
        )
        serve.run_many(
            [serve.RunTarget(target, name=name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def _given(self, model: str) -> dict[str, str]:
        """Return the settings of a model that were given to this server, as its replicas get them."""
        declared = self._registry.plugin("models", model).settings
        return {setting.name: setting.given for setting in declared if setting.given is not None}

    def _configuration(self, model: str) -> str:
        """Return, as JSON, all that must be the same for servers to share a model's replicas."""
        plugin = self._registry.plugin("models", model)
        given = self._given(model)
        for setting in plugin.settings:
            if setting.is_secret and setting.name in given:
                given[setting.name] = hashlib.blake2b(given[setting.name].encode(), digest_size=8).hexdigest()
        versions = {"version of the plugin": plugin.version, "protocol of the ray_consumer": PROTOCOL}
        told = {**versions, **vars(settings.demand(model)), **given}
        return json.dumps(told, sort_keys=True)

    @staticmethod
    def _compare(model: str, configuration: str, details: dict[str, Any]) -> None:
        found = _noted_configuration(details)
        if found == configuration:
            return
        theirs, ours = json.loads(found), json.loads(configuration)
        differences = ", ".join(
            f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        )
        raise ModelLoadFailed(
            f"the model {model} runs on the Ray cluster with other settings: {differences}; stop it first, or use "
            "another RAY_APP_PREFIX"
        )

    def _delete(self, name: str, configuration: str) -> None:
        """Delete an application and wait until its replicas have ended. Ray Serve's own wait looks once a second.

        One that has come in its place is another server's: that is neither deleted nor waited for.
        """
        from ray import serve

        found = self._details().get(name)
        if found is None or not _is_configured(found, configuration):
            return
        made_at = found["last_deployed_time_s"]
        serve.delete(name, _blocking=False)
        give_up_at = time.monotonic() + _DELETE_TIMEOUT_S
        while (found := self._details().get(name)) and time.monotonic() < give_up_at:
            if found["last_deployed_time_s"] != made_at or _is_deployed(found):
                return
            time.sleep(_CHECK_S)

    # Watching

    def _poll(self) -> None:
        """Keep what is known of the models up to date, until ``close``, or until Ray Serve has been shut down."""
        import ray

        while not self._closing.wait(_POLL_S):
            apps = list(self._apps.values())  # before what is told of them: one that has come since is not gone
            try:
                found = self._details()
                self._answers = True
            except Exception as error:  # Ray may fail in many ways while the head is away
                if self._answers and not self._closing.is_set():
                    logger.warning("Ray Serve's controller does not answer: %s", error)
                self._answers = False
                # Not one that is only away, as with its node: Ray starts that one again.
                if isinstance(error.__cause__, ray.exceptions.ActorDiedError):
                    return
                continue
            for app in apps:
                app.take(_details_of(app, found))

    def _details(self) -> dict[str, Any]:
        import ray

        # Not by Ray Serve's client, which would start another cluster after the end of this one.
        asked = self._controller.get_serve_instance_details.remote()
        try:
            found: dict[str, Any] = ray.get(asked, timeout=_ANSWER_TIMEOUT_S)["applications"]
        except ray.exceptions.RayError as error:
            raise _head_is_silent() from error
        return found

    def _wait(self, app: App, response: Any, is_wanted: Callable[[], bool]) -> Any:
        try:
            while True:
                try:
                    return response.result(timeout_s=_CHECK_S)
                except TimeoutError:
                    if response._replica_result is None:  # no replica has it
                        if app.gone:
                            raise _was_stopped(app.model) from None
                        if not self._answers:
                            raise _head_is_silent() from None
                    # What a replica has of a model that was stopped may finish. When the grace period is over, Ray
                    # Serve ends the replica, and the engine's jobs end too, so that nobody waits any more.
                    if not is_wanted():
                        raise ModelUnavailable("nobody waits for it any more") from None
        except (ModelUnavailable, EOFError, OSError):
            response.cancel()
            raise


def _handle(name: str) -> Any:
    from ray import serve

    return serve.get_deployment_handle(DEPLOYMENT, name)


def _details_of(app: App, found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what Ray Serve tells of an application; None where it goes, or has gone and another has its name."""
    told = found.get(app.name)
    if told is None or _word(told["status"]) == "deleting":
        return None
    details: dict[str, Any] | None = told["deployments"].get(DEPLOYMENT)
    return details if details and _noted_configuration(details) == app.configuration else None


def _is_deployed(app: dict[str, Any]) -> bool:
    """Tell whether an application is to run: Ray Serve may use again what is left of one that is being deleted."""
    return bool(app["deployments"]) and _word(app["status"]) != "deleting"


def _noted_configuration(details: dict[str, Any]) -> str:
    noted = details["deployment_config"].get("user_config") or {}
    return str(noted.get("configuration", "{}"))


def _is_configured(app: dict[str, Any], configuration: str) -> bool:
    """Tell whether an application may be the one with this configuration: a new one does not tell it at once."""
    details = app["deployments"].get(DEPLOYMENT)
    return not details or _noted_configuration(details) == configuration


def _was_stopped(model: str) -> ModelUnavailable:
    return ModelUnavailable(f"the model {model} was stopped", retry_after=1)


def _head_is_silent() -> ModelUnavailable:
    return ModelUnavailable("the head of the Ray cluster does not answer", retry_after=_RETRY_AFTER_S)


def _replicas(details: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"node": replica.get("node_ip"), "pid": replica.get("pid"), "state": _word(replica["state"])}
        for replica in details["replicas"]
    ]


def _word(state: Any) -> str:
    return str(getattr(state, "value", state)).lower()


def _reason(details: dict[str, Any]) -> str:
    """Return why replicas failed to load, as one of them put it, or else the end of what Ray says."""
    message = str(details["message"])
    found = _REASON.search(message)
    if found is not None:
        return str(json.loads(found[1]))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray does not say why"


def _differ(provenance: dict[str, str | None], known: dict[str, str | None]) -> bool:
    return any(provenance[key] != known[key] for key in provenance if key != "device")


def _no_room(model: str) -> str:
    import ray
    from ray._private.state import available_resources_per_node

    asked = _in_words(settings.demand(model).of_a_replica())
    free = available_resources_per_node()
    nodes = [
        f"{node['NodeManagerAddress']} ({_in_words(_free_of(node, free.get(node['NodeID'], {})))})"
        for node in ray.nodes()
        if node["Alive"]
    ]
    return (
        f"no node of the Ray cluster has room for a replica of the model {model}, which takes {asked}; "
        f"there are {', '.join(nodes) or 'none'}"
    )


def _free_of(node: dict[str, Any], free: dict[str, float]) -> dict[str, str]:
    return {
        name: f"{free.get(name, 0):g} of {total:g} free"
        for name, total in sorted(node["Resources"].items())
        if not name.startswith("node:") and name not in ("memory", "object_store_memory")
    }


def _in_words(amounts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {amount}" for name, amount in amounts.items()) or "nothing"


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ModelUnavailable(
            f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}", retry_after=_RETRY_AFTER_S
        ) from None


def _collect_modules(staging: str) -> str:
    """Copy the core and all plugins of this installation into a folder, as one package, and return its path."""
    import feature_extraction_server

    target = os.path.join(staging, "feature_extraction_server")
    for folder in feature_extraction_server.__path__:
        shutil.copytree(
            folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy
        )
    return target
