"""The manifests for models on a Ray cluster: they are valid, and fit the server's own manifests and each other."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dev_server import ROOT
from tests.packaging.test_deployment import KUBERNETES_VERSION, container, gunicorn_setting, image_folders, pod
from tests.packaging.test_deployment import manifest as manifest_of_the_server

FOLDER = ROOT / "kuberay"
PLUGIN = ROOT / "plugins" / "feature_extraction_server-consumers-ray"
GUIDE = ROOT / "docs" / "cluster.md"
PATCHES = ["deployment.yaml", "settings.yaml"]
#: What ray.io/v1 has of the fields that are used: KubeRay's schema is not among Kubernetes' own.
FIELDS = {
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def manifest(name: str) -> dict[str, Any]:
    resource: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return resource


def cluster() -> dict[str, Any]:
    return manifest("raycluster.yaml")


def groups() -> list[dict[str, Any]]:
    """Return the head's group and the workers'."""
    return [cluster()["spec"]["headGroupSpec"], *cluster()["spec"]["workerGroupSpecs"]]


def containers() -> list[dict[str, Any]]:
    return [one for group in groups() for one in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize(
    "name", ["networkpolicy.yaml", "networkpolicy-servers.yaml", "secret.example.yaml", "settings.yaml"]
)
def test_manifest_is_what_kubernetes_schema_says(name: str) -> None:
    kubernetes_validate.validate(manifest(name), KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("group", groups(), ids=["head", "workers"])
def test_pods_of_the_cluster_are_what_kubernetes_schema_says(group: dict[str, Any]) -> None:
    one = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": group["template"]["spec"]}

    kubernetes_validate.validate(one, KUBERNETES_VERSION, strict=True)


def test_cluster_has_fields_that_kuberay_knows() -> None:
    head, *workers = groups()

    assert cluster()["spec"].keys() <= FIELDS["cluster"]
    assert head.keys() <= FIELDS["head"]
    assert all(group.keys() <= FIELDS["workers"] for group in workers)
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


def test_kustomization_has_every_manifest_but_the_example() -> None:
    told = manifest("kustomization.yaml")
    found = {path.name for path in FOLDER.glob("*.yaml")}

    listed = {*told["resources"], *(patch["path"] for patch in told["patches"])} - {"../kubernetes"}

    assert listed == found - {"kustomization.yaml", "secret.example.yaml"}


@pytest.mark.parametrize("name", PATCHES)
def test_patch_is_of_a_manifest_of_the_server(name: str) -> None:
    patched = manifest(name)
    original = manifest_of_the_server("configmap.yaml" if patched["kind"] == "ConfigMap" else name)

    assert {key: patched[key] for key in ("apiVersion", "kind")} == {
        key: original[key] for key in ("apiVersion", "kind")
    }
    assert patched["metadata"]["name"] == original["metadata"]["name"]


def server_pod() -> dict[str, Any]:
    """Return what the server's pod has besides what its own manifest says."""
    spec: dict[str, Any] = manifest("deployment.yaml")["spec"]["template"]["spec"]
    return spec


def test_patch_of_the_deployment_is_of_its_container() -> None:
    (patched,) = server_pod()["containers"]

    assert patched["name"] == container()["name"]


def test_node_beside_the_server_is_what_kubernetes_schema_says() -> None:
    spec = server_pod() | {"containers": pod()["containers"], "volumes": [*pod()["volumes"], *server_pod()["volumes"]]}
    one = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "server"}, "spec": spec}

    kubernetes_validate.validate(one, KUBERNETES_VERSION, strict=True)


def test_server_sees_the_processes_and_the_files_of_the_node_beside_it() -> None:
    (node,) = server_pod()["initContainers"]
    (server,) = server_pod()["containers"]
    mounts = [*container()["volumeMounts"], *server["volumeMounts"]]

    assert server_pod()["shareProcessNamespace"] is True
    assert all(mount in mounts for mount in node["volumeMounts"])
    assert "/tmp" in {mount["mountPath"] for mount in node["volumeMounts"]}


def test_node_beside_the_server_belongs_to_the_cluster_and_runs_nothing() -> None:
    (node,) = server_pod()["initContainers"]

    assert f"--address={manifest('settings.yaml')['data']['RAY_ADDRESS']}" in node["command"]
    assert "--num-cpus=0" in node["command"]


def test_every_pod_has_the_image_and_the_user_of_the_server() -> None:
    assert {one["image"] for one in (*containers(), *server_pod()["initContainers"])} == {container()["image"]}
    for group in groups():
        assert group["template"]["spec"]["securityContext"] == pod()["securityContext"]


def test_image_of_every_group_is_replaced_with_that_of_the_server() -> None:
    (replacement,) = manifest("kustomization.yaml")["replacements"]

    paths = [path for target in replacement["targets"] for path in target["fieldPaths"]]

    wanted = [one["name"] for one in (*containers(), *server_pod()["initContainers"])]
    assert [name for path in paths for name in re.findall(r"\[name=(.+)\]", path)] == wanted


def test_server_and_every_pod_have_the_same_token() -> None:
    secret = manifest("secret.example.yaml")
    autoscaler = cluster()["spec"]["autoscalerOptions"]

    for one in (*server_pod()["initContainers"], *server_pod()["containers"], *containers(), autoscaler):
        given = {variable["name"]: variable for variable in one["env"]}
        reference = given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        assert reference["name"] == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]


def test_server_asks_the_service_of_the_clusters_head() -> None:
    (head, *_) = containers()
    (port,) = [port["containerPort"] for port in head["ports"] if port["name"] == "gcs"]

    assert manifest("settings.yaml")["data"]["RAY_ADDRESS"] == f"{cluster()['metadata']['name']}-head-svc:{port}"


def test_settings_are_settings_of_the_server() -> None:
    known = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))

    assert manifest("settings.yaml")["data"].keys() <= known


def test_new_node_has_time_to_start_before_who_waits_is_told_that_there_is_none() -> None:
    default = dict(re.findall(r"^#(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    given = default | manifest_of_the_server("configmap.yaml")["data"] | manifest("settings.yaml")["data"]

    assert float(given["RAY_PLACEMENT_TIMEOUT"]) >= 300
    assert float(given["RAY_PLACEMENT_TIMEOUT"]) < float(given["REQUEST_TIMEOUT"])


def test_nodes_have_the_servers_token_for_checkpoints() -> None:
    secret = manifest_of_the_server("secret.example.yaml")
    (worker,) = groups()[1]["template"]["spec"]["containers"]
    (token,) = [variable for variable in worker["env"] if variable["name"] == "HF_TOKEN"]

    reference = token["valueFrom"]["secretKeyRef"]

    assert reference == {"name": secret["metadata"]["name"], "key": "HF_TOKEN", "optional": True}
    assert reference["key"] in secret["stringData"]


def test_nodes_share_the_servers_checkpoints() -> None:
    (workers,) = groups()[1:]
    mounts = {mount["name"]: mount["mountPath"] for mount in containers()[-1]["volumeMounts"]}
    (claim,) = [one["persistentVolumeClaim"] for one in workers["template"]["spec"]["volumes"] if "emptyDir" not in one]

    assert claim["claimName"] == manifest_of_the_server("pvc.yaml")["metadata"]["name"]
    assert mounts["cache"] in image_folders()


def test_version_of_ray_is_one_that_the_plugin_takes() -> None:
    dependencies = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = [re.findall(r">=([\d.]+),<(\d+)", line) for line in dependencies if line.startswith("ray")]
    ((least, below),) = wanted
    version = [int(part) for part in cluster()["spec"]["rayVersion"].split(".")]

    assert [int(part) for part in least.split(".")] <= version < [int(below)]


def test_only_the_cluster_and_the_servers_reach_the_cluster() -> None:
    policy = manifest("networkpolicy.yaml")["spec"]
    name = cluster()["metadata"]["name"]
    let_in = [one["podSelector"]["matchLabels"] for rule in policy["ingress"] for one in rule["from"]]

    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": name}
    assert {"ray.io/cluster": name} in let_in
    assert any(
        labels.items() <= manifest_of_the_server("deployment.yaml")["spec"]["template"]["metadata"]["labels"].items()
        for labels in let_in
    )


def test_only_the_cluster_and_the_servers_reach_more_of_a_server_than_its_http_port() -> None:
    policy = manifest("networkpolicy-servers.yaml")["spec"]
    for_all, for_nodes = policy["ingress"]

    assert policy["podSelector"] == manifest_of_the_server("deployment.yaml")["spec"]["selector"]
    assert for_all == {"ports": [{"port": "http"}]}
    assert for_nodes == manifest("networkpolicy.yaml")["spec"]["ingress"][0]


def test_every_link_of_the_guide_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", GUIDE.read_text()) if "://" not in link]

    assert links
    assert [link for link in links if not (GUIDE.parent / link).exists()] == []


def test_load_balancer_closes_idle_connections_before_the_servers_do() -> None:
    (seconds,) = re.findall(r"^ +keepalive_timeout (\d+)s;$", GUIDE.read_text(), re.MULTILINE)

    assert int(seconds) < gunicorn_setting("keepalive")


def test_settings_that_the_guide_names_are_settings_of_the_server() -> None:
    known = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    of_ray = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_REDIS_ADDRESS"}

    told = set(re.findall(r"\b(RAY_[A-Z_]*[A-Z])\b(?!_?\{)", GUIDE.read_text()))

    assert {name for name in told if not name.endswith("_BLIP2")} <= known | of_ray
