"""The communication matrix in words, English and Chinese, with the columns of the security notes. Renders only."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from securerun.evidence.matrix import IN, OUT, WITHIN, Connection, Service
from securerun.text import printable

_SHOWN = 8
# A spreadsheet takes what begins like this for a formula (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@")

# The columns in the order of the notes; these names are the keys of the JSON in every language.
COLUMNS = (
    "component",
    "source_device",
    "source_ip",
    "source_port",
    "destination_device",
    "destination_ip",
    "destination_port",
    "protocol",
    "description",
    "changeable",
    "authentication",
    "encryption",
    "plane",
    "version",
    "special_scenario",
    "remarks",
)


@dataclass(frozen=True)
class Setting:
    """What is known of the host and the installation. node: this node's name; ephemeral: the ports that its kernel
    chooses from; torch: the version that is installed, "" if none is."""

    node: str
    ephemeral: str
    torch: str


@dataclass(frozen=True)
class _Words:
    """The words for one service. version: whether that of torch applies."""

    component: str
    description: str
    changeable: str
    remarks: str
    scenario: str
    of_torch: bool = True


@dataclass(frozen=True)
class _Language:
    columns: tuple[str, ...]
    node: str
    peer: str
    any_peer: str
    others: str
    chosen: str
    chosen_from: str
    random: str
    hccl_source: str
    none: str
    no_authentication: str
    by_tag: str
    not_applicable: str
    all_versions: str
    within: str
    listening: str
    silent: str
    closed: str
    closed_by_key: str
    also_by_key: str
    joint: str
    stop: str
    services: Mapping[Service, _Words]


_ENGLISH = _Language(
    columns=(
        "Component",
        "Source device",
        "Source IP",
        "Source port",
        "Destination device",
        "Destination IP",
        "Destination port (listening)",
        "Protocol",
        "Port description",
        "Listening port changeable",
        "Authentication",
        "Encryption",
        "Plane",
        "Version",
        "Special scenario",
        "Remarks",
    ),
    node="this node ({node})",
    peer="peer: another node of the job",
    any_peer="any host",
    others="others, as --public names them, and peers",
    chosen="chosen by the operating system",
    chosen_from="chosen by the operating system ({ports})",
    random="random, chosen by the operating system",
    hccl_source="{ports}, or chosen by the operating system",
    none="none",
    no_authentication="none",
    by_tag="the tag of the job's key, in the packet that opens a connection (securerun)",
    not_applicable="not applicable",
    all_versions="all versions",
    within="no other host takes part",
    listening="listening now: {ports}",
    silent="nothing listens here now",
    closed="securerun lets only the peers connect",
    closed_by_key="securerun lets only those connect who show the tag of the job's key, from any address",
    also_by_key="and whoever shows the tag of the job's key, from any address",
    joint=", ",
    stop="; ",
    services={
        Service.STATIC: _Words(
            "PyTorch",
            "the store at which agents and workers meet (TCPStore, static rendezvous)",
            "yes: --master-port",
            "listens on all addresses of node 0",
            "torchrun with --master-addr and --master-port",
        ),
        Service.C10D: _Words(
            "PyTorch",
            "the store at which the agents meet (TCPStore, c10d rendezvous)",
            "yes: --rdzv-endpoint",
            "listens on all addresses of the node that the endpoint names",
            "torchrun with --rdzv-backend c10d",
        ),
        Service.PARALLEL: _Words(
            "PyTorch (torch_npu)",
            "the store at which agents and workers meet (parallel TCPStore of torch_npu_run)",
            "yes: --master-port",
            "listens on the address in --master-addr",
            "torch_npu_run",
        ),
        Service.ENDPOINT: _Words(
            "PyTorch",
            "the endpoint at which the agents meet",
            "yes: --rdzv-endpoint",
            "what listens there is the rendezvous plug-in's own",
            "torchrun with a rendezvous backend of a plug-in",
        ),
        Service.ETCD: _Words(
            "etcd",
            "the etcd server at which the agents meet",
            "yes: --rdzv-endpoint",
            "the server is not the job's; securerun does not close it",
            "torchrun with --rdzv-backend etcd or etcd-v2",
        ),
        Service.WORKER_STORE: _Words(
            "PyTorch",
            "the store at which the workers meet (TCPStore of the agent)",
            "no: chosen at random",
            "listens on all addresses of the node that gets rank 0",
            "every rendezvous but static and parallel",
        ),
        Service.GLOO: _Words(
            "PyTorch (gloo)",
            "one port for each process and process group with backend gloo",
            "no: chosen at random",
            "listens on the address of GLOO_SOCKET_IFNAME, else of the host name",
            "process groups with backend gloo",
        ),
        Service.NCCL: _Words(
            "PyTorch (NCCL)",
            "bootstrap and socket transport of NCCL",
            "no: chosen at random",
            "listens on the addresses of NCCL_SOCKET_IFNAME",
            "process groups with backend nccl",
        ),
        Service.HCCL: _Words(
            "HCCL",
            "HCCL's exchange between hosts",
            "yes: HCCL_IF_BASE_PORT or HCCL_HOST_SOCKET_PORT_RANGE",
            "CANN decides; RoCE runs on the NPUs' own ports, which no host firewall sees",
            "jobs on Ascend NPUs",
            of_torch=False,
        ),
        Service.ADDED: _Words(
            "training script",
            "added with --ports",
            "yes: --ports names it, the script opens it",
            "opened by the script or by one of its libraries",
            "where the script listens by itself",
            of_torch=False,
        ),
        Service.PUBLIC: _Words(
            "training script",
            "port that --public leaves open to others: metrics, HTTP, probes",
            "yes: where the script listens; named with --public",
            "securerun lets only the source IPs connect, as far as this host's own rules let them",
            "where the script serves others than the job's nodes",
            of_torch=False,
        ),
        Service.COLLECTIVE: _Words(
            "PyTorch (gloo or NCCL)",
            "process groups: bound to one address, as gloo and NCCL do",
            "no: chosen at random",
            "one for each process and process group",
            "process groups with backend gloo or nccl",
        ),
        Service.OTHER: _Words(
            "PyTorch or training script",
            "bound to all addresses by a worker: a store of the workers' own, or a server of the script's",
            "no: chosen at random",
            "held by a process that the agent has started",
            "where a worker listens by itself",
        ),
    },
)

_CHINESE = _Language(
    columns=(
        "组件",
        "源设备",
        "源IP",
        "源端口",
        "目的设备",
        "目的IP",
        "目的端口（侦听）",
        "协议",
        "端口说明",
        "侦听端口是否可更改",
        "认证方式",
        "加密方式",
        "所属平面",
        "版本",
        "特殊场景",
        "备注",
    ),
    node="本节点（{node}）",
    peer="对端：该任务的其他节点",
    any_peer="任意主机",
    others="--public 指定的其他主机，以及对端节点",
    chosen="操作系统自动分配",
    chosen_from="操作系统自动分配（{ports}）",
    random="随机端口，操作系统自动分配",
    hccl_source="{ports}，或由操作系统自动分配",
    none="无",
    no_authentication="无认证方式",
    by_tag="作业密钥的标签，由发起连接的首个报文携带（securerun）",
    not_applicable="不涉及",
    all_versions="所有版本",
    within="无其他主机参与",
    listening="当前侦听：{ports}",
    silent="当前无侦听",
    closed="securerun 仅允许对端节点连接",
    closed_by_key="securerun 仅允许出示作业密钥标签的一方连接，不限地址",
    also_by_key="以及出示作业密钥标签的任何一方，不限地址",
    joint="、",
    stop="；",
    services={
        Service.STATIC: _Words(
            "PyTorch",
            "静态分布式场景下，代理进程和训练进程汇合所用的 TCPStore（backend 为 static）",
            "是：--master-port",
            "在 0 号节点的所有地址上侦听",
            "torchrun 使用 --master-addr 和 --master-port",
        ),
        Service.C10D: _Words(
            "PyTorch",
            "动态分布式场景下，代理进程汇合所用的 TCPStore（backend 为 c10d）",
            "是：--rdzv-endpoint",
            "在 endpoint 所指节点的所有地址上侦听",
            "torchrun 使用 --rdzv-backend c10d",
        ),
        Service.PARALLEL: _Words(
            "PyTorch（torch_npu）",
            "代理进程和训练进程汇合所用的 TCPStore（torch_npu_run 的 parallel）",
            "是：--master-port",
            "在 --master-addr 指定的地址上侦听",
            "torch_npu_run",
        ),
        Service.ENDPOINT: _Words(
            "PyTorch",
            "代理进程汇合的地址和端口",
            "是：--rdzv-endpoint",
            "由 rendezvous 插件自行侦听",
            "torchrun 使用插件提供的 rendezvous backend",
        ),
        Service.ETCD: _Words(
            "etcd",
            "代理进程汇合所用的 etcd 服务",
            "是：--rdzv-endpoint",
            "该服务不属于本任务，securerun 不对其设限",
            "torchrun 使用 --rdzv-backend etcd 或 etcd-v2",
        ),
        Service.WORKER_STORE: _Words(
            "PyTorch",
            "训练进程汇合所用的 TCPStore（由代理进程侦听）",
            "否：随机端口",
            "在 rank 0 所在节点的所有地址上侦听",
            "backend 不为 static 和 parallel 时",
        ),
        Service.GLOO: _Words(
            "PyTorch（gloo）",
            "每个进程在每个 gloo 通信组中侦听一个端口",
            "否：随机端口",
            "在 GLOO_SOCKET_IFNAME 指定的网卡地址上侦听，未指定时为主机名对应的地址",
            "使用 gloo 通信组时",
        ),
        Service.NCCL: _Words(
            "PyTorch（NCCL）",
            "NCCL 的 bootstrap 和 socket 传输",
            "否：随机端口",
            "在 NCCL_SOCKET_IFNAME 指定的网卡地址上侦听",
            "使用 nccl 通信组时",
        ),
        Service.HCCL: _Words(
            "HCCL",
            "HCCL 在主机之间的通信",
            "是：HCCL_IF_BASE_PORT 或 HCCL_HOST_SOCKET_PORT_RANGE",
            "由 CANN 中的 HCCL 组件控制；RoCE 使用 NPU 自身的网口，不经过主机防火墙",
            "在昇腾 NPU 上训练时",
            of_torch=False,
        ),
        Service.ADDED: _Words(
            "训练脚本",
            "通过 --ports 添加的端口",
            "是：由脚本侦听，通过 --ports 指定",
            "由训练脚本或其依赖库侦听",
            "训练脚本自行侦听端口时",
            of_torch=False,
        ),
        Service.PUBLIC: _Words(
            "训练脚本",
            "通过 --public 对其他主机开放的端口，如指标、HTTP、探针",
            "是：由脚本侦听，通过 --public 指定",
            "securerun 仅允许源 IP 所列主机连接，且不放行主机自身防火墙禁止的连接",
            "训练脚本对任务之外提供服务时",
            of_torch=False,
        ),
        Service.COLLECTIVE: _Words(
            "PyTorch（gloo 或 NCCL）",
            "通信组：绑定在单个地址上，与 gloo 和 NCCL 一致",
            "否：随机端口",
            "每个进程在每个通信组中一个",
            "使用 gloo 或 nccl 通信组时",
        ),
        Service.OTHER: _Words(
            "PyTorch 或训练脚本",
            "训练进程在所有地址上侦听的端口：训练进程自己的 TCPStore，或脚本提供的服务",
            "否：随机端口",
            "由代理进程启动的进程持有",
            "训练进程自行侦听端口时",
        ),
    },
)

LANGUAGES: Mapping[str, _Language] = {"en": _ENGLISH, "zh": _CHINESE}
_EVERY_HOST = {"0.0.0.0/0", "::/0"}

Row = Mapping[str, str]


def rows(connections: Iterable[Connection], setting: Setting, language: str) -> list[Row]:
    """Return the matrix in words: for each connection the text of every column, by the names in COLUMNS."""
    words = LANGUAGES[language]
    return [_row(connection, setting, words) for connection in connections]


def _row(connection: Connection, setting: Setting, words: _Language) -> Row:
    service = words.services[connection.service]
    ports = ", ".join(connection.ports) or words.random
    own = words.node.format(node=setting.node)
    open_to_all = _EVERY_HOST.intersection(connection.sources + connection.destinations)
    named = words.others if connection.service is Service.PUBLIC else words.peer
    peer = words.any_peer if open_to_all and not connection.by_key else named
    source = peer if connection.direction == IN else own
    destination = peer if connection.direction == OUT else own
    cells = (
        service.component,
        source,
        ", ".join(connection.sources),
        _source_port(connection, setting, words),
        service.component if connection.service is Service.ETCD else destination,
        ", ".join(connection.destinations),
        ports,
        "TCP",
        service.description,
        service.changeable,
        words.by_tag if open_to_all and connection.by_key else words.no_authentication,
        words.none,
        words.not_applicable,
        setting.torch if service.of_torch and setting.torch else words.all_versions,
        service.scenario,
        words.stop.join(_remarks(connection, service, words)),
    )
    return {name: printable(cell) for name, cell in zip(COLUMNS, cells)}


def _source_port(connection: Connection, setting: Setting, words: _Language) -> str:
    if connection.service is Service.HCCL and connection.ports:
        return words.hccl_source.format(ports=", ".join(connection.ports))
    if connection.direction == IN or not setting.ephemeral:
        return words.chosen
    return words.chosen_from.format(ports=setting.ephemeral)


def _remarks(connection: Connection, service: _Words, words: _Language) -> Iterator[str]:
    yield service.remarks
    if connection.direction == WITHIN:
        yield words.within
    anywhere = bool(_EVERY_HOST.intersection(connection.sources))
    if connection.direction == IN and connection.service is not Service.PUBLIC:
        if not anywhere:
            yield words.closed
        if connection.by_key:
            yield words.closed_by_key if anywhere else words.also_by_key
    if connection.listening is not None:
        yield (
            words.listening.format(ports=words.joint.join(connection.listening))
            if connection.listening
            else words.silent
        )


def table(found: Sequence[Row], language: str) -> str:
    """Write a block a row, a line a column: sixteen columns side by side fit no terminal. Long lists are cut short."""
    labels = LANGUAGES[language].columns
    width = max(map(_width, labels)) + 2
    blocks = (
        "".join(f"{label}{' ' * (width - _width(label))}{_some(row[name])}\n" for name, label in zip(COLUMNS, labels))
        for row in found
    )
    return "\n".join(blocks)


def markdown(found: Sequence[Row], language: str) -> str:
    """Return a table in Markdown (GitHub's), all of it."""
    labels = LANGUAGES[language].columns
    lines = [_markdown_line(labels), _markdown_line(["---"] * len(labels))]
    lines += [_markdown_line([row[name] for name in COLUMNS]) for row in found]
    return "\n".join(lines) + "\n"


def comma_separated(found: Sequence[Row], language: str) -> str:
    """Return comma-separated values (RFC 4180); what a spreadsheet would compute begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(LANGUAGES[language].columns)
    for row in found:
        writer.writerow([f"'{row[name]}" if row[name].startswith(_FORMULA) else row[name] for name in COLUMNS])
    return text.getvalue()


def as_json(found: Sequence[Row], language: str) -> str:
    """Return the columns by their names in COLUMNS, with their labels, and the rows."""
    labels = dict(zip(COLUMNS, LANGUAGES[language].columns))
    document = {"language": language, "columns": labels, "rows": found}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Row], str], str]] = {
    "table": table,
    "md": markdown,
    "csv": comma_separated,
    "json": as_json,
}


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(cell: str) -> str:
    """Return text that Markdown shows as it is."""
    for character in "\\|`*_<>[]":
        cell = cell.replace(character, f"\\{character}")
    return cell


def _some(text: str) -> str:
    parts = text.split(", ")
    return text if len(parts) <= _SHOWN else f"{', '.join(parts[:_SHOWN])}, … ({len(parts)})"


def _width(text: str) -> int:
    """How many columns of a terminal a label takes: Chinese characters take two."""
    return sum(1 if character < "\u1100" else 2 for character in text)
