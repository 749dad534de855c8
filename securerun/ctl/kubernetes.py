"""securerunctl setup kubernetes: the guard of each node as a DaemonSet, and a pod whose job it guards.

Prints, and asks no cluster for anything. The guard's pod has all privilege, so that no other needs any.
"""

from __future__ import annotations

import re

from securerun.errors import UsageError
from securerun.guard.program import LISTEN_ARGUMENT, SOCKET
from securerun.linux import packages

PARTS = ("all", "guard", "pod")
NAMESPACE = "securerun-system"
# An OCI reference, without what would end a text of YAML's; it is one there, or `null` and `1` were none.
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]{0,254}")

_GUARD = """\
# The guard of each node. Made by `securerunctl setup kubernetes`.
# Its image is made by scripts/image.sh; nobody else may be able to change that, or what is in this namespace.
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels:
    pod-security.kubernetes.io/enforce: privileged
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: securerun-guard
  namespace: {namespace}
  labels: {{app.kubernetes.io/name: securerun-guard}}
spec:
  selector:
    matchLabels: {{app.kubernetes.io/name: securerun-guard}}
  updateStrategy:
    type: RollingUpdate   # what stands on a node stays meanwhile; the launchers there have the new guards take over
  template:
    metadata:
      labels: {{app.kubernetes.io/name: securerun-guard}}
    spec:
      hostPID: true       # who connects is told by the node's process ids
      hostNetwork: true   # for pods that have the node's network; into those of others it goes by itself
      dnsPolicy: Default
      automountServiceAccountToken: false
      enableServiceLinks: false
      priorityClassName: system-node-critical
      terminationGracePeriodSeconds: 5
      tolerations:
      - operator: Exists
      containers:
      - name: guard
        image: "{image}"
        command: [securerun-guard, {argument}, {socket}]
        securityContext:
          privileged: true
          runAsUser: 0
        resources:
          requests: {{cpu: 50m, memory: 64Mi}}
          limits: {{memory: 8Gi}}   # 20 MB for each job that runs or waits
        volumeMounts:
        - {{name: run, mountPath: /run}}
        - {{name: cgroups, mountPath: /sys/fs/cgroup}}
        - {{name: limits, mountPath: /etc/securerun, readOnly: true}}
      volumes:
      - name: run         # the socket's directory, and the records that `securerunctl status` shows the node's root
        hostPath: {{path: /run, type: Directory}}
      - name: cgroups
        hostPath: {{path: /sys/fs/cgroup, type: Directory}}
      - name: limits      # guard.toml, what jobs may ask for
        hostPath: {{path: /etc/securerun, type: DirectoryOrCreate}}
"""

_POD = """\
# A job's pod: to copy from. It has what Pod Security's "restricted" asks for, but for the mount (hostPath).
apiVersion: v1
kind: Pod
metadata:
  name: train
spec:
  restartPolicy: Never
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    seccompProfile: {{type: RuntimeDefault}}
  containers:
  - name: train
    image: "{image}"
    command: [securerun, --nproc-per-node, "8", /workspace/train.py]
    env:
    - {{name: SECURERUN_PEERS, value: "train-0.train,train-1.train"}}   # the job's other pods
    securityContext:
      allowPrivilegeEscalation: false
      capabilities: {{drop: [ALL]}}
    volumeMounts:
    - {{name: securerun, mountPath: {directory}, readOnly: true}}
  volumes:
  - name: securerun       # of the directory, not of the socket in it: that is another once the guard was restarted
    hostPath: {{path: {directory}, type: Directory}}
"""


def print_manifests(part: str, image: str, job_image: str) -> None:
    """Print the manifests of the guard, of a pod, or of both. Raises UsageError for what is no part or no image.

    image: the guard's, "" for that of scripts/image.sh.
    """
    image = image or f"localhost/securerun-guard:{packages.version('securerun') or 'latest'}"
    if part not in PARTS:
        raise UsageError(f"--only {part}: there is no such part; write --only guard or --only pod")
    for option, name in (("--image", image), ("--job-image", job_image)):
        if not _IMAGE.fullmatch(name):
            raise UsageError(f"{option}: {name!r} is no name of an image; write {option} registry.example/name:tag")
    guard = _GUARD.format(namespace=NAMESPACE, image=image, argument=LISTEN_ARGUMENT, socket=SOCKET)
    pod = _POD.format(image=job_image, directory=SOCKET.parent)
    print({"guard": guard, "pod": pod}.get(part, f"{guard}---\n{pod}"), end="")
