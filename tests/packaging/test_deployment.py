"""The compose file, the workflow and the manifests for Kubernetes: they are valid, and fit the image and each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from flask.testing import FlaskClient

from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.model import ModelOptions
from feature_extraction_server.flask.app import create_app

MANIFESTS = sorted(path.name for path in (ROOT / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES_VERSION = "1.30"
# Of gunicorn.conf.py, and of the library that downloads checkpoints.
OTHER_VARIABLES = {"NUMBER_OF_WORKERS", "HF_TOKEN"}
DEPLOYMENT_GUIDE = ROOT / "docs" / "deployment.md"


def manifest(name: str) -> dict[str, Any]:
    resource: dict[str, Any] = yaml.safe_load((ROOT / "kubernetes" / name).read_text())
    return resource


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("deployment.yaml")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    assert isinstance(only, dict)
    return only


def gunicorn_setting(name: str) -> int:
    (value,) = re.findall(rf"^{name} = (\d+)$", (ROOT / "gunicorn.conf.py").read_text(), re.MULTILINE)
    return int(value)


def image_folders() -> set[str]:
    """Return the folders that the image makes for whatever user it runs as."""
    (folders,) = re.findall(r"chmod 1777 (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return set(folders.split())


def fenced_yaml(text: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        pytest.param("vendor.compose-spec", "compose.yaml", id="compose file"),
        pytest.param("vendor.github-workflows", ".github/workflows/ci.yml", id="workflow"),
    ],
)
def test_file_is_what_its_schema_says(schema: str, file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", services())
def test_service_of_compose_may_write_where_the_server_does(name: str) -> None:
    service = services()[name]

    writable = {*service["tmpfs"], *(volume.split(":")[1] for volume in service["volumes"])}

    assert service["read_only"] is True
    assert writable == image_folders() | {"/tmp"}


def seconds_to_end() -> float:
    """How long requests have to finish, and then models."""
    return float(gunicorn_setting("graceful_timeout")) + ModelOptions().stop_grace_period


@pytest.mark.parametrize("name", services())
def test_compose_gives_a_service_the_time_that_gunicorn_takes_to_end(name: str) -> None:
    assert int(services()[name]["stop_grace_period"].removesuffix("s")) > seconds_to_end()


def test_only_the_profile_gpu_starts_the_service_that_takes_a_gpu() -> None:
    builds = {name: service["build"]["args"]["DEVICE"] for name, service in services().items()}
    profiles = {name: service.get("profiles") for name, service in services().items()}

    assert builds == {"server": "cpu", "server-gpu": "cuda"}
    assert profiles == {"server": None, "server-gpu": ["gpu"]}


def test_services_of_compose_share_checkpoints_but_neither_ports_nor_jobs() -> None:
    first, second = ({*service["volumes"], *service["ports"]} for service in services().values())

    assert first & second == {"cache:/root/.cache"}


def test_workflow_builds_the_image_for_each_device() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())

    built = {entry["device"] for entry in workflow["jobs"]["image"]["strategy"]["matrix"]["include"]}

    assert built == {service["build"]["args"]["DEVICE"] for service in services().values()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_what_kubernetes_schema_says(name: str) -> None:
    kubernetes_validate.validate(manifest(name), KUBERNETES_VERSION, strict=True)


def test_kustomization_has_every_manifest_but_the_example() -> None:
    assert manifest("kustomization.yaml")["resources"] == [name for name in MANIFESTS if ".example." not in name]


def test_kustomization_names_the_image_of_the_deployment() -> None:
    (image,) = manifest("kustomization.yaml")["images"]

    assert image["name"] == container()["image"]


@pytest.mark.parametrize("name", ["service.yaml", "pdb.yaml"])
def test_selector_finds_the_pods_of_the_deployment(name: str) -> None:
    labels = manifest("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    selector = manifest(name)["spec"]["selector"]

    assert selector.get("matchLabels", selector).items() <= labels.items()


def test_autoscaler_scales_the_deployment() -> None:
    deployment = manifest("deployment.yaml")

    target = manifest("hpa.yaml")["spec"]["scaleTargetRef"]

    assert target == {key: deployment[key] for key in ("apiVersion", "kind")} | {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]


def test_deployment_takes_what_the_other_manifests_define() -> None:
    (claim,) = [volume["persistentVolumeClaim"] for volume in pod()["volumes"] if "persistentVolumeClaim" in volume]
    (config,) = [source["configMapRef"] for source in container()["envFrom"] if "configMapRef" in source]
    (secret,) = [source["secretRef"] for source in container()["envFrom"] if "secretRef" in source]

    assert claim["claimName"] == manifest("pvc.yaml")["metadata"]["name"]
    assert config["name"] == manifest("configmap.yaml")["metadata"]["name"]
    assert secret == {"name": manifest("secret.example.yaml")["metadata"]["name"], "optional": True}


def test_pod_may_write_where_the_server_does() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}

    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert set(mounts.values()) == image_folders() | {"/tmp"}
    assert set(mounts) == {volume["name"] for volume in pod()["volumes"]}


@pytest.mark.parametrize("told_in", [DEPLOYMENT_GUIDE, ROOT / "kubernetes" / "pvc.yaml"], ids=lambda path: path.name)
def test_volume_that_pods_cannot_share_is_said_to_take_one_pod_at_a_time(told_in: Path) -> None:
    told = " ".join(told_in.read_text().replace("`", "").replace("\n#", "").split())
    (strategy,) = re.findall(r"ReadWriteOnce, with maxReplicas: 1 in hpa\.yaml, and strategy: (\{.+?\}) ", told)
    deployment = manifest("deployment.yaml")
    deployment["spec"]["strategy"] = yaml.safe_load(strategy)

    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    kubernetes_validate.validate(deployment, KUBERNETES_VERSION, strict=True)


def test_pod_has_the_user_of_the_image() -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    security = pod()["securityContext"]

    assert security["runAsNonRoot"] is True
    assert (str(security["runAsUser"]), str(security["runAsGroup"])) == user


def test_pod_is_given_the_time_that_gunicorn_takes_to_end() -> None:
    _, before = container()["lifecycle"]["preStop"]["exec"]["command"]

    assert pod()["terminationGracePeriodSeconds"] > int(before) + seconds_to_end()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(manifest("configmap.yaml")["data"], id="config map"),
        pytest.param(manifest("secret.example.yaml")["stringData"], id="secret"),
    ],
)
def test_settings_for_kubernetes_are_settings_of_the_server(given: dict[str, str]) -> None:
    known = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))

    assert given.keys() <= known | OTHER_VARIABLES


def test_what_is_asked_for_over_http_are_routes_of_the_server(engine: Engine) -> None:
    template = manifest("deployment.yaml")["spec"]["template"]
    probes = {container()[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    (checked,) = re.findall(
        r'^URL = "http://127.0.0.1:5000(/.+)"$', (ROOT / "docker" / "healthcheck.py").read_text(), re.MULTILINE
    )

    asked = probes | {checked, template["metadata"]["annotations"]["prometheus.io/path"]}

    assert asked <= {rule.rule for rule in create_app(engine).url_map.iter_rules()}


def test_autoscaler_and_the_rule_for_its_adapter_name_a_metric_of_the_server(client: FlaskClient) -> None:
    (wanted,) = [metric["pods"]["metric"]["name"] for metric in manifest("hpa.yaml")["spec"]["metrics"]]
    told = re.findall(r"^# TYPE (\w+) gauge$", client.get("/metrics").text, re.MULTILINE)
    (guide,) = [text for text in fenced_yaml(DEPLOYMENT_GUIDE.read_text()) if "rules:" in text]
    (rule,) = yaml.safe_load(guide)["rules"]["custom"]

    assert wanted in told
    assert rule["name"]["as"] == wanted
    assert rule["seriesQuery"].split("{")[0] == wanted


def test_every_link_of_the_guide_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", DEPLOYMENT_GUIDE.read_text()) if "://" not in link]

    assert links
    assert [link for link in links if not (DEPLOYMENT_GUIDE.parent / link).exists()] == []


def test_guide_tells_what_to_decide_in_files_that_exist() -> None:
    table = DEPLOYMENT_GUIDE.read_text().split("| File |", 1)[1].split("\n\n", 1)[0]
    told = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)

    assert told
    assert [name for name in told if not (ROOT / "kubernetes" / name).exists()] == []
