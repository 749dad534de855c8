"""What stays of root's environment where root has a job started as another user (--run-as): a list of what jobs need.

Of the rest nobody knows what it is good for: it may be root's agent (SSH_AUTH_SOCK), root's session (XDG_SESSION_ID,
DBUS_SESSION_BUS_ADDRESS), or a key of root's (AWS_SECRET_ACCESS_KEY, KRB5CCNAME). docs/privilege.md has the list too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Root's own word on what more is to stay: names with commas or spaces between, `HF_*` for all that begin so.
VARIABLE = "SECURERUN_KEEP_ENV"

_NAMES = (
    # The shell and its terminal; where programs, libraries and modules are.
    "PATH PWD TERM COLORTERM NO_COLOR FORCE_COLOR CLICOLOR COLUMNS LINES LANG LANGUAGE TZ TMPDIR HOSTNAME EDITOR PAGER "
    "LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH PKG_CONFIG_PATH CMAKE_PREFIX_PATH "
    "CC CXX CFLAGS CXXFLAGS LDFLAGS MAKEFLAGS MAX_JOBS VIRTUAL_ENV VIRTUAL_ENV_PROMPT MODULEPATH LOADEDMODULES "
    "MODULESHOME SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE "
    # The job: who is which rank, and where the nodes meet.
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE "
    "NNODES NUM_NODES NPROC_PER_NODE GPUS_PER_NODE NPUS_PER_NODE RANK_TABLE_FILE RANK_TABLE_PATH RANK_ID RANK_SIZE "
    "DEVICE_ID JOB_ID PE_HOSTFILE NHOSTS NSLOTS DUMP_GRAPH_PATH KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT "
    "POD_IP POD_NAME HOST_IP "
    # The way out.
    "http_proxy https_proxy ftp_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY"
)
NAMES = frozenset(_NAMES.split())
PREFIXES = (
    *("SECURERUN_", "MASTER_", "PET_", "LC_", "PYTHON", "CONDA_", "SOURCE_DATE_"),
    *("TORCH", "PYTORCH_", "TRITON_", "GLOO_", "NCCL_", "RCCL_", "UCX_", "UCC_", "FI_", "XLA_", "JAX_", "TF_", "NVTE_"),
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ROCM_", "GPU_", "MIOPEN_"),
    *("HCCL_", "ASCEND_", "ACL_", "ACLNN_", "NPU_", "ATB_", "ASDOPS_", "LCCL_", "LCAL_", "TASK_QUEUE_", "COMBINED_"),
    *("TOOLCHAIN_", "TE_", "MS_", "MINDSPORE_", "MINDX_", "INF_NAN_", "CPU_AFFINITY_", "MULTI_STREAM_", "STREAMS_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "MALLOC_", "LRU_", "GRPC_", "RAY_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "ACCELERATE_", "FSDP_", "DEEPSPEED_", "DS_", "MEGATRON_"),
    *("WANDB_", "TENSORBOARD_", "VLLM_", "NVSHMEM_", "LIGHTNING_", "PL_"),
    *(
        "SLURM_",
        "SLURMD_",
        "PBS_",
        "LSB_",
        "LSF_",
        "LS_",
        "SGE_",
        "VC_",
        "MA_",
        "OMPI_",
        "PRTE_",
        "PMI_",
        "PMIX_",
        "I_MPI_",
    ),
)
# A word of a name that says that the value is for nobody else: SLURM_JWT, HF_TOKEN, WANDB_API_KEY. Not TOKENIZERS.
_SECRETS = (
    "AUTH AUTHORIZATION APIKEY COOKIE COOKIES CRED CREDENTIAL CREDENTIALS JWT KEY KEYS KEYTAB PASS PASSPHRASE "
    "PASSWD PASSWORD PRIVATE PW PWD SECRET SECRETS SECURITY SIGNATURE TOKEN TOKENS TRANSPORTS"
)
_SECRET = frozenset(_SECRETS.split())
_PLAIN = frozenset({"PWD", "SECURERUN_KEY"})
# With whoever gets the value goes the password in it: http://root:secret@proxy:3128, or without the scheme.
_PROXY = re.compile(r"(?i)[a-z]+_proxy")
_USER_IN_ADDRESS = re.compile(r"://[^/\s]*@")
_SEPARATORS = re.compile(r"[,\s]+")


def of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what stays of an environment for another user."""
    named = [name for name in _SEPARATORS.split(environment.get(VARIABLE, "")) if name]
    return {name: value for name, value in environment.items() if _stays(name, value, named)}


def _stays(name: str, value: str, named: Iterable[str]) -> bool:
    if name == VARIABLE:
        return False
    if any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in named):
        return True
    if name not in NAMES and not name.startswith(PREFIXES):
        return False
    if _USER_IN_ADDRESS.search(value) or (_PROXY.fullmatch(name) and "@" in value):
        return False
    return name in _PLAIN or _SECRET.isdisjoint(name.upper().split("_"))
