"""Container files and manifests say what the server understands: flags, ports, paths, times, files.

Neither Docker nor Kubernetes is needed: what is in the files is compared with the code.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from sparqle_stream import arguments
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import hub, probes
from sparqle_stream.server.settings import ServerConfig

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
YAML = sorted([*DEPLOY.glob("*.yaml"), *DEPLOY.glob("kubernetes/*.yaml")])
UVICORN_S = 2  # its own shutdown, after the drain


def name_of(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def parsed(command: list[str]):
    """What `serve` makes of the words of a command; unknown flags and bad values raise."""
    assert command[0] == "serve"
    return arguments.parser_for("serve").parse(command[1:], {})


def pods() -> list[tuple[str, dict]]:
    """Every pod that the manifests describe."""
    (deployment,) = documents("kubernetes/deployment.yaml")
    (service,) = documents("kserve.yaml")
    return [
        ("deployment", deployment["spec"]["template"]["spec"]),
        ("kserve", service["spec"]["predictor"]),
    ]


PODS = pytest.mark.parametrize("pod", [p for _, p in pods()], ids=[n for n, _ in pods()])


@pytest.mark.parametrize("path", YAML, ids=name_of)
def test_yaml_can_be_read(path):
    for document in documents(name_of(path)):
        assert isinstance(document, dict)
        assert "kind" in document or "services" in document


@PODS
def test_a_pod_starts_a_server_that_understands_it(pod):
    (container,) = pod["containers"]
    args = parsed(container["args"])
    assert args.host == "0.0.0.0"
    assert args.port == container["ports"][0]["containerPort"]
    folder = str(Path(args.key_file).parent)
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == folder]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    assert volume["secret"]["secretName"] in (DEPLOY / "README.md").read_text()


@PODS
def test_probes_ask_what_the_server_answers(pod):
    (container,) = pod["containers"]
    (port,) = container["ports"]
    routes = {route.path for route in probes.routes()}
    for probe, path in [
        ("startup", "/healthz"),
        ("liveness", "/healthz"),
        ("readiness", "/readyz"),
    ]:
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked["path"] == path
        assert path in routes
        assert asked["port"] in (port.get("name"), port["containerPort"])


@PODS
def test_a_pod_has_time_to_drain(pod):
    """preStop, then --drain-s, then the last words and close frames, all before SIGKILL."""
    (container,) = pod["containers"]
    sleep_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = parsed(container["args"]).drain_s
    needed = sleep_s + drain_s + hub.FLUSH_S + hub.CLOSE_S + UVICORN_S
    assert pod["terminationGracePeriodSeconds"] >= needed


@PODS
def test_no_variables_of_services(pod):
    """Kubernetes names them after the service: the server would not start with them."""
    (service,) = documents("kubernetes/service.yaml")
    variable = f"{service['metadata']['name'].upper().replace('-', '_')}_PORT"
    with pytest.raises(ConfigError, match="unknown environment variable"):
        arguments.check_variables({variable: "tcp://10.0.0.1:80"})
    assert pod["enableServiceLinks"] is False


def test_the_service_finds_the_pods():
    (deployment,) = documents("kubernetes/deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (service,) = documents("kubernetes/service.yaml")
    (budget,) = documents("kubernetes/disruption.yaml")
    assert service["spec"]["selector"] == labels
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    names = {p["name"] for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} <= names


def test_the_autoscaler_asks_for_a_metric_that_there_is():
    (scaler,) = documents("kubernetes/autoscaler.yaml")
    (metric,) = scaler["spec"]["metrics"]
    (deployment,) = documents("kubernetes/deployment.yaml")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    name = metric["pods"]["metric"]["name"]
    assert f"`{name}`" in (REPO / "docs/protocol.md").read_text()
    slots = parsed(deployment["spec"]["template"]["spec"]["containers"][0]["args"]).slots
    assert 0 < float(metric["pods"]["target"]["averageValue"]) < slots


def test_kustomize_builds_them():
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kinds = {d["kind"] for d in yaml.safe_load_all(run.stdout)}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget"}


def test_every_manifest_is_named():
    (kustomization,) = documents("kubernetes/kustomization.yaml")
    text = (DEPLOY / "kubernetes/kustomization.yaml").read_text()
    assert all((DEPLOY / "kubernetes" / r).is_file() for r in kustomization["resources"])
    for path in (DEPLOY / "kubernetes").glob("*.yaml"):
        assert path.name in text or path.name == "kustomization.yaml"


# --- containers -----------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """Words and the rest of every instruction of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def value(path: Path, word: str) -> str:
    return [rest for found, rest in instructions(path) if found == word][-1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_starts_a_server(path):
    command = json.loads(value(path, "ENTRYPOINT")) + json.loads(value(path, "CMD"))
    assert command[0] == arguments.PROG
    args = parsed(command[1:])
    assert (args.host, str(args.port)) == ("0.0.0.0", value(path, "EXPOSE"))
    assert args.compute == ("cuda" if "cuda" in path.name else "cpu")
    assert f":{args.port}/healthz" in value(path, "HEALTHCHECK")
    assert value(path, "STOPSIGNAL") == "SIGTERM"
    assert value(path, "USER").isdigit(), "Kubernetes can tell a number from root"


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_copies_what_there_is(path):
    """Everything from the context exists, and the list of what to leave out lets it in."""
    rules = path.with_name(f"{path.name}.dockerignore").read_text().split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    copied: set[str] = set()
    for word, rest in instructions(path):
        if word == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    assert copied
    assert copied == set(allowed)
    for name in copied:
        assert (REPO / name).exists(), name
        assert not any(fnmatch.fnmatch(name, rule) for rule in rules[1:] if rule[0] not in "!#*")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_has_all_that_the_build_reads(path):
    """The build back end reads the files that pyproject.toml names."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {package.split("/")[0] for package in wheel}
    text = " ".join(rest for word, rest in instructions(path) if word == "COPY")
    assert needed <= set(text.split())
    for extra in re.findall(r"'\.\[(\w+)\]'", path.read_text()):
        assert extra in project["project"]["optional-dependencies"]


def test_compose():
    (compose,) = documents("compose.yaml")
    cfg = ServerConfig()
    needed = cfg.drain_s + hub.FLUSH_S + hub.CLOSE_S + UVICORN_S
    for name, service in compose["services"].items():
        dockerfile = REPO / service["build"]["dockerfile"]
        assert dockerfile in DOCKERFILES, name
        assert (DEPLOY / service["build"]["context"]).resolve() == REPO
        port = parsed(json.loads(value(dockerfile, "CMD"))).port
        assert service["ports"] == [f"{port}:{port}"]
        assert float(service["stop_grace_period"].removesuffix("s")) >= needed
        (secret,) = service["secrets"]
        key_file = parsed(json.loads(value(dockerfile, "CMD"))).key_file
        assert key_file == f"/run/secrets/{secret}"
        assert secret in compose["secrets"]


def test_the_readme_names_every_file_and_only_flags_that_there_are():
    text = (DEPLOY / "README.md").read_text()
    for path in [*DOCKERFILES, *DEPLOY.glob("*.yaml"), *DEPLOY.glob("*.py")]:
        assert path.name in text or path.name == "__init__.py"
    known = {o for a in arguments.parser_for("serve")._actions for o in a.option_strings}
    theirs = {"--build", "--profile", "--from-file", "--gpus", "--name", "--secret"}
    for flag in re.findall(r"`[^`]*?(--[a-z][a-z-]*)", text):
        assert flag in known | theirs, flag
