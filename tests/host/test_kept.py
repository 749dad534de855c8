"""What stays of root's environment for a job of another user."""

from __future__ import annotations

import pytest
from checkout import CHECKOUT

from securerun.host import kept
from securerun.job import batch

JOBS = (
    *("PATH", "LANG", "LC_ALL", "TZ", "TERM", "MASTER_ADDR", "PET_NNODES", "SECURERUN_PEERS", "SLURM_JOB_NODELIST"),
    *(
        "PBS_NODEFILE",
        "PE_HOSTFILE",
        "LSB_HOSTS",
        "VC_WORKER_HOSTS",
        "HCCL_IF_IP",
        "NCCL_DEBUG",
        "GLOO_SOCKET_IFNAME",
        "TORCH_LOGS",
    ),
    *("ASCEND_HOME_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH", "no_proxy"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "TOKENIZERS_PARALLELISM", "RANK_TABLE_FILE", "KUBERNETES_SERVICE_HOST"),
    *batch._OPEN_MPI,
)
ROOTS = (
    *("SSH_AUTH_SOCK", "SSH_CONNECTION", "XAUTHORITY", "DISPLAY", "GPG_AGENT_INFO", "MAIL", "KUBECONFIG", "HISTFILE"),
    *("XDG_SESSION_ID", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS", "SUDO_UID", "BASH_ENV"),
    *("AWS_PROFILE", "AWS_SESSION_TOKEN", "KRB5CCNAME", "VAULT_ADDR", "SLURM_JWT", "HF_TOKEN", "WANDB_API_KEY"),
    *("MY_OWN", "BASH_FUNC_x%%", "PYTHON_KEYRING_PASSWORD", "RAY_auth_token", "SECURERUN_KEEP_ENV"),
)
WITH_A_PASSWORD = ("http_proxy", "HTTPS_PROXY", "HF_ENDPOINT", "SECURERUN_X")


@pytest.mark.parametrize("name", JOBS)
def test_what_jobs_need_stays(name: str) -> None:
    assert kept.of({name: "x"}) == {name: "x"}


@pytest.mark.parametrize("name", ROOTS)
def test_what_may_be_roots_own_goes(name: str) -> None:
    assert kept.of({name: "x"}) == {}


@pytest.mark.parametrize("name", WITH_A_PASSWORD)
def test_addresses_with_a_password_go(name: str) -> None:
    assert kept.of({name: "http://proxy:1/"}) == {name: "http://proxy:1/"}
    assert kept.of({name: "http://root:secret@proxy:1/"}) == {}
    assert kept.of({"all_proxy": "root:secret@proxy:1"}) == {}


def test_root_names_what_is_to_stay_as_well() -> None:
    before = {"MY_OWN": "1", "MY_KEY": "2", "HF_TOKEN": "3", "OTHER": "4", "MINE": "5"}
    assert kept.of({**before, kept.VARIABLE: "MY_*,HF_TOKEN  OTHERS"}) == {
        "MY_OWN": "1",
        "MY_KEY": "2",
        "HF_TOKEN": "3",
    }


def test_the_page_lists_what_stays() -> None:
    page = (CHECKOUT / "docs/privilege.md").read_text()
    words = page[page.index("```text\n") :].partition("\n```")[0].split()[1:]
    assert words == [*sorted(kept.NAMES), *(f"{one}*" for one in sorted(kept.PREFIXES))]
