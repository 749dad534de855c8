"""securerunctl setup kubernetes: what it prints is a guard for each node, and pods with nothing beyond "restricted".

No kubelet is at hand: what it would make of the manifests, as far as this goes, is made by podman.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from checkout import COMMANDS
from conversation import guards
from engines import Engine, Node
from holding import Held
from hosts import Network, eventually
from node_guard import HOLDING, network_of
from probe import reach

from securerun.guard.program import SOCKET

PORT = 7001
SETUP = (str(COMMANDS / "securerunctl"), "setup", "kubernetes")


def printed(*words: str) -> list[dict[str, Any]]:
    text = subprocess.run([*SETUP, *words], check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def test_pod_has_what_restricted_asks_for_and_no_more() -> None:
    """Pod Security Standards, "restricted": only the one mount is what it does not know."""
    (pod,) = printed("--only", "pod", "--job-image", "registry.example/job:1")
    spec = pod["spec"]
    assert not {"hostPID", "hostIPC", "hostNetwork", "hostUsers"} & spec.keys()
    around = spec["securityContext"]
    assert around.keys() == {"runAsNonRoot", "runAsUser", "seccompProfile"}
    assert around["runAsNonRoot"] is True and around["runAsUser"] != 0
    assert around["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["volumeMounts"] == [{"name": "securerun", "mountPath": str(SOCKET.parent), "readOnly": True}]
    assert spec["volumes"] == [{"name": "securerun", "hostPath": {"path": str(SOCKET.parent), "type": "Directory"}}]
    assert container["image"] == "registry.example/job:1"


def test_guards_see_the_nodes_processes_network_and_cgroups() -> None:
    kinds = {document["kind"]: document for document in printed()}
    assert list(kinds) == ["Namespace", "DaemonSet", "Pod"]
    assert [document["kind"] for document in printed("--only", "guard")] == ["Namespace", "DaemonSet"]
    template = kinds["DaemonSet"]["spec"]["template"]
    assert template["metadata"]["labels"] == kinds["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert template["spec"]["hostPID"] and template["spec"]["hostNetwork"]
    assert kinds["DaemonSet"]["metadata"]["namespace"] == kinds["Namespace"]["metadata"]["name"]
    (container,) = template["spec"]["containers"]
    assert container["securityContext"]["privileged"] and container["image"].startswith("localhost/securerun-guard:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "job"], "there is no such part; write --only guard"),
        (["--image", "a\nb: c"], "is no name of an image"),
        (["--job-image", "{x}"], "is no name of an image"),
    ],
)
def test_what_is_no_image_is_not_written_into_a_manifest(words: list[str], said: str) -> None:
    done = subprocess.run([*SETUP, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


@pytest.fixture(scope="module")
def network(root_and_tools: None) -> Iterator[Network]:
    with Network("node0", "pod0", "pod1", "stranger") as network:
        yield network


def test_guard_of_the_daemon_set_serves_a_pod_of_the_example(network: Network) -> None:
    documents = {document["kind"]: document.get("spec", {}) for document in printed()}
    with Node(network["node0"]) as node:
        podman = node.podman()
        guard = _guard_container(podman, documents["DaemonSet"]["template"]["spec"])
        assert eventually(node.place(str(SOCKET)).is_socket, seconds=20), guard.stderr and guard.stderr.read()
        options = (*_options_of(documents["Pod"]), network_of(network["pod0"]))
        words = ("--peers", network["pod1"].ipv4, "--listen", str(PORT))
        process = podman.popen(*options, command=[*HOLDING, *words], stdin=subprocess.PIPE)
        holder = Held(process)
        assert holder.start.get("guarding") == ["shield"], holder.start
        target = (network["pod0"].ipv4, PORT)
        assert reach(network["stranger"], [target]) == {target: False}
        assert reach(network["pod1"], [target]) == {target: True}
        # The node's own administrator sees the run.
        shown = node.run(node.host, [SETUP[0], "status"], timeout=20)
        assert holder.run_id in shown.stdout and "container /libpod_parent/" in shown.stdout
        podman.kill("guard")
        guard.wait(timeout=20)
        assert eventually(lambda: not guards(node))
        assert reach(network["stranger"], [target]) == {target: False}
        _guard_container(podman, documents["DaemonSet"]["template"]["spec"])
        assert holder.hear_of("another has taken over")
        holder.let_go()


def _guard_container(podman: Engine, spec: Mapping[str, Any]) -> subprocess.Popen[str]:
    for volume in spec["volumes"]:
        if volume["hostPath"]["type"] == "DirectoryOrCreate":
            podman.node.place(volume["hostPath"]["path"]).mkdir(parents=True, exist_ok=True)
    (container,) = spec["containers"]
    command = [str(COMMANDS / container["command"][0]), *container["command"][1:]]
    return podman.popen("--name=guard", *_options_of(spec), command=command)


def _options_of(spec: Mapping[str, Any]) -> Iterator[str]:
    """What podman has to be told for a pod of one container."""
    (container,) = spec["containers"]
    hosts = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        read_only = ":ro" if mount.get("readOnly") else ":rw"
        yield f"--volume={hosts[mount['name']]}:{mount['mountPath']}{read_only}"
    own, around = container["securityContext"], spec.get("securityContext", {})
    if own.get("privileged"):
        yield "--privileged"
        yield "--cgroupns=host"  # as containerd has it; elsewhere the guard goes where init is, which it may not here
    if own.get("allowPrivilegeEscalation") is False:
        yield "--security-opt=no-new-privileges"
    for capability in own.get("capabilities", {}).get("drop", ()):
        yield f"--cap-drop={capability.lower()}"
    yield f"--user={own.get('runAsUser', around.get('runAsUser'))}"
    for kind in ("PID", "Network"):
        if spec.get(f"host{kind}"):
            yield f"--{kind.lower()}=host"


@pytest.mark.parametrize("name", ["null", "true", "1", "0x1f", "a:"])
def test_name_of_an_image_is_a_text_whatever_it_looks_like(name: str) -> None:
    (pod,) = printed("--only", "pod", "--job-image", name)
    assert pod["spec"]["containers"][0]["image"] == name
