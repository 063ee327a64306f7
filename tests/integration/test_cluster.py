"""The cluster files, checked offline: Ray's validator, the clouds' own request types, and what keeps strangers out."""

import copy
import json
import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray
import yaml
from google.cloud import compute_v1
from google.protobuf import json_format
from ray.autoscaler._private.util import prepare_config, validate_config

from hedgemix.config import Recipe
from pipeline import record

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("cluster.yaml", "clusters/gcp.yaml", "clusters/on-prem.yaml")
CLOUDS = FILES[:2]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` would use it; raises what Ray's validator raises."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def ec2_complaints(node: dict[str, Any]) -> str:
    """What EC2's RunInstances request says about a node_config. Ray turns SubnetIds into a SubnetId itself."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **{k: v for k, v in node.items() if k != "SubnetIds"}}
    return botocore.validate.ParamValidator().validate(request, shape).generate_report()


def open_doors(config: dict[str, Any]) -> list[str]:
    """Everything in a prepared configuration that would let a stranger reach Ray."""
    found = []
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    for command in starts:
        if "--head" in command and re.findall(r"--dashboard-host[= ](\S+)", command) != ["127.0.0.1"]:
            found.append(f"dashboard not bound to 127.0.0.1 alone: {command}")
        if "0.0.0.0" in command:
            found.append(f"binds every address: {command}")
        if "RAY_AUTH_MODE=token" not in command:
            found.append(f"starts without token authentication: {command}")
    if len(starts) != 2:
        found.append("expected one `ray start` on the head and one on the workers")
    if config["docker"]:
        options = config["docker"]["run_options"]
        if "--env RAY_AUTH_MODE=token" not in options:
            found.append("the container does not set RAY_AUTH_MODE=token")
        if any(re.match(r"-[pP]|--publish", option) for option in options):
            found.append("the container publishes a port")
    if "RAY_AUTH_MODE=disabled" in json.dumps(config):
        found.append("something turns token authentication off")
    if not any(local.endswith(".ray-token") for local in config["file_mounts"].values()):
        found.append("the token is not brought to the nodes")
    if "security_group" in config["provider"]:
        found.append("provider.security_group makes Ray create a group that opens port 22 to everybody")
    for kind, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        if config["provider"]["type"] == "aws" and not (node.get("SecurityGroupIds") and node.get("SubnetIds")):
            found.append(f"{kind} has no security group of its own")
        if config["provider"]["type"] == "gcp":
            networks = [interface.get("subnetwork") for interface in node.get("networkInterfaces", [])]
            if not networks or None in networks:
                found.append(f"{kind} is not in a network of its own")
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may look anything up, or depend on an account."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it_and_no_door_is_open(name: str) -> None:
    assert open_doors(prepared(load(name))) == []


def test_aws_nodes_are_valid_ec2_requests() -> None:
    for node_type in load("cluster.yaml")["available_node_types"].values():
        assert not ec2_complaints(node_type["node_config"])


def test_gcp_nodes_are_valid_compute_requests() -> None:
    for node_type in load("clusters/gcp.yaml")["available_node_types"].values():
        compute_v1.Instance.from_json(json.dumps(node_type["node_config"]))


@pytest.mark.parametrize("name", CLOUDS)
def test_one_gpu_node_holds_one_seed_of_the_record(name: str) -> None:
    compute = Recipe(recipe="record").compute
    config = prepared(load(name))
    kinds = {k: t for k, t in config["available_node_types"].items() if k != config["head_node_type"]}
    assert kinds
    for kind in kinds.values():
        assert kind["resources"]["GPU"] >= compute.workers * compute.gpus_per_worker
        assert kind["resources"]["CPU"] >= compute.workers * compute.cpus_per_worker
        assert kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]
    assert config["available_node_types"][config["head_node_type"]]["resources"]["GPU"] == 0
    assert 0 < config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("name", FILES)
def test_nodes_run_the_versions_the_project_pins(name: str) -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    config = load(name)
    commands = "\n".join(config["setup_commands"])
    torch_pin = next(pin for pin in pins if pin.startswith("torch=="))
    ray_pin = next(pin for pin in pins if pin.startswith("ray["))
    assert ray_pin == f"ray[default,train]=={ray.__version__}"
    assert ray_pin in commands
    assert commands.index(f"install -q {torch_pin}") < commands.index("install -q -e ")
    if "docker" in config:
        assert config["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311-")


@pytest.mark.parametrize("name", FILES)
def test_the_project_is_mounted_without_what_stays_at_home(name: str) -> None:
    config = load(name)
    target = next(remote for remote, local in config["file_mounts"].items() if local == ".")
    assert any(f"-e {target}" in command for command in config["setup_commands"])
    assert {".git/", ".venv/", ".ray-token/", "/runs/", "/data/"} <= set(config["rsync_exclude"])
    if "docker" in config:
        assert "--volume /shared:/shared" in config["docker"]["run_options"]
    assert any("mountpoint -q /shared" in command for command in config["initialization_commands"])


@pytest.mark.parametrize("name", FILES)
def test_what_to_fill_in_stands_in_one_place(name: str) -> None:
    text = (ROOT / name).read_text()
    below = text[text.index("cluster_name:") :]
    assert "REPLACE_ME" not in below
    commands = ["ray up", "ray dashboard", "export RAY_AUTH_MODE=token", "ray job submit", "ray down"]
    header = text[text.index("these commands") : text.index("metadata:")]
    assert [c for c in commands if c in header] == commands
    [job] = [line for line in header.splitlines() if "pipeline/record.py" in line]
    recipe, options = record.parse(job.partition("pipeline/record.py")[2].split())
    assert (recipe.recipe, options.seeds) == ("record", (1337, 42, 7))
    assert options.out.startswith("/shared/") and recipe.data.shards_dir.startswith("/shared")


@pytest.mark.parametrize("name", FILES)
def test_a_mistyped_key_is_refused(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        prepared({**load(name), "idle_timeout_minute": 5})


@pytest.mark.parametrize("name", CLOUDS)
def test_an_unknown_head_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        prepared({**load(name), "head_node_type": "brain"})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "binds every address"),
        ("--dashboard-host=127.0.0.1", "", "dashboard not bound"),
        ("RAY_AUTH_MODE=token ", "", "without token"),
        ("./.ray-token", "./elsewhere", "token is not brought"),
    ],
)
def test_an_open_door_is_seen(name: str, old: str, new: str, complaint: str) -> None:
    text = (ROOT / name).read_text()
    assert old in text
    assert complaint in "\n".join(open_doors(prepared(yaml.safe_load(text.replace(old, new)))))


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("-p8265:8265", "publishes a port"),
        ("-P", "publishes a port"),
        ("--publish=6379", "publishes a port"),
        ("--env RAY_AUTH_MODE=disabled", "turns token authentication off"),
    ],
)
def test_an_open_container_is_seen(name: str, option: str, complaint: str) -> None:
    config = load(name)
    config["docker"]["run_options"].append(option)
    assert complaint in "\n".join(open_doors(prepared(config)))


def test_ray_s_own_start_commands_would_be_seen() -> None:
    config = load("cluster.yaml")
    del config["head_start_ray_commands"]
    assert "binds every address" in "\n".join(open_doors(prepared(config)))


@pytest.mark.parametrize(
    ("name", "key"), [("cluster.yaml", "SecurityGroupIds"), ("clusters/gcp.yaml", "networkInterfaces")]
)
def test_a_node_without_its_own_network_is_seen(name: str, key: str) -> None:
    for kind in load(name)["available_node_types"]:
        config = load(name)
        del config["available_node_types"][kind]["node_config"][key]
        assert f"{kind} " in "\n".join(open_doors(prepared(config)))


def test_a_mistyped_node_field_is_refused() -> None:
    node = load("cluster.yaml")["available_node_types"]["h100x8"]["node_config"]
    assert "InstanceTipe" in ec2_complaints({**node, "InstanceTipe": "p5.48xlarge"})
    node = load("clusters/gcp.yaml")["available_node_types"]["h100x8"]["node_config"]
    with pytest.raises(json_format.ParseError, match="machineTipe"):
        compute_v1.Instance.from_json(json.dumps({**node, "machineTipe": "a3-highgpu-8g"}))
