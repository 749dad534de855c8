"""The report of a launch as one page for people: no script, no resource from elsewhere, every text escaped.

What stands in it was chosen by others (command lines, peers, whoever knocked), so besides the escaping the page itself
forbids scripts and loading (Content-Security-Policy). Renders, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from securerun.firewall.policy import NAMESPACE
from securerun.text import nodes_guarded, printable, span

Document = Mapping[str, Any]

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --text: #1c2128; --soft: #5b6572; --line: #dfe3e8;
  --good: #17713e; --good-back: #e1f4e8; --bad: #b0202f; --bad-back: #fde7e9; --warn: #8a5a00; --warn-back: #fdf1d8;
  --accent: #2458c5; --accent-back: #dfe8fb; --quiet: #c3cad3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1f26; --text: #e6e9ee; --soft: #9aa5b4; --line: #2c343f;
    --good: #6fd39a; --good-back: #153524; --bad: #ff8f98; --bad-back: #43191e; --warn: #f0c267; --warn-back: #3b2d10;
    --accent: #8db2ff; --accent-back: #1c2c4c; --quiet: #475261;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 .9rem; font-weight: 650; }
p { margin: 0; }
.command { flex-basis: 100%; color: var(--soft); }
code, .number, time {
  font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .875em;
}
.number, time { font-variant-numeric: tabular-nums; }
.number { white-space: nowrap; }
.short { display: inline-block; min-width: 5rem; }
.badge { padding: .15rem .75rem; border-radius: 2rem; font-weight: 600; font-size: .9rem; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.warn { color: var(--warn); background: var(--warn-back); }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1.25rem 1.4rem; margin-top: 1.1rem;
}
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.1rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.6rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-weight: 550; }
.phases { display: flex; gap: 3px; margin-top: 1.4rem; }
.phases div { min-width: 4.5rem; }
.phases i { display: block; height: .7rem; border-radius: .2rem; background: var(--quiet); margin-bottom: .35rem; }
.phases .job i { background: var(--accent); }
.phases span { display: block; font-size: .82rem; line-height: 1.3; color: var(--soft); }
.line { list-style: none; margin: 0; padding: 0; }
.line li { display: grid; grid-template-columns: 6.5rem 1.4rem 1fr; position: relative; padding-bottom: .75rem; }
.line li:last-child { padding-bottom: 0; }
.line time { color: var(--soft); text-align: right; padding-right: .5rem; line-height: 1.7; }
.line i {
  width: .65rem; height: .65rem; border-radius: 50%; background: var(--quiet); margin: .45rem auto 0; z-index: 1;
}
.line li::before {
  content: ""; position: absolute; left: calc(6.5rem + .7rem - 1px); top: .8rem; bottom: -.8rem; width: 2px;
  background: var(--line);
}
.line li:last-child::before { display: none; }
.line .guarded i, .line .installed i, .line .released i { background: var(--accent); }
.line .blocked i, .line .failure i { background: var(--bad); }
.line .success i { background: var(--good); }
.line .notice i, .line .checked i { background: var(--warn); }
.line .blocked span, .line .failure span { color: var(--bad); }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: .82rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
.right { text-align: right; }
.none { color: var(--soft); }
* + .none { margin-top: .6rem; }
h2 + .none { margin-top: 0; }
.finding { padding: .75rem 0; border-top: 1px solid var(--line); }
.finding:first-of-type { border-top: 0; padding-top: 0; }
.finding:last-child { padding-bottom: 0; }
.finding p { color: var(--soft); }
.finding code {
  display: inline-block; margin-top: .3rem; padding: .15rem .5rem; border-radius: .3rem; background: var(--page);
}
.bare { margin: 0; padding: 0; list-style: none; columns: 15rem; }
footer { margin-top: 1.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .8rem 2.5rem; }
  section { padding: 1rem; }
  h1 { font-size: 1.35rem; }
  .line li { grid-template-columns: 1.4rem 1fr; }
  .line time { grid-column: 2; grid-row: 1; text-align: left; padding: 0; }
  .line i { grid-row: 1; }
  .line span { grid-column: 2; }
  .line li::before { left: calc(.7rem - 1px); }
}
@media print {
  body { background: none; }
  section { break-inside: avoid; }
}
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_PHASES = (("began", "guarded", "getting ready"), ("guarded", "finished", "guarded"), ("finished", "ended", "release"))
_OUTCOMES = {"ended well": "good", "failed": "bad", "refused": "bad"}


def render(document: Document) -> str:
    """Return the page of a report (`report.of_journal`)."""
    sections = [
        _summary(document),
        _timeline(document),
        _denied(document),
        *_plan(document["launch"], has_key=bool(document["key"])),
        _layers(document),
        _findings("What the checks of this host found", document["preflight"]),
        _findings("Files that are more open than they should be", document["permissions"]),
    ]
    body = "\n".join([_header(document), *filter(None, sections), _footer(document)])
    return _PAGE.format(title=_text(f"securerun: {_name(document)} {document['outcome']}"), style=_STYLE, body=body)


def _header(document: Document) -> str:
    guarded = ("guarded", "good") if document["protected"] else ("not guarded", "warn")
    if document["protected"] and document["launch"]["not_guarded"]:
        guarded = ("guarded in part", "warn")
    return (
        f"<header>\n<h1>{_text(_name(document))}</h1>\n"
        f"{_badge(document['outcome'], _OUTCOMES[document['outcome']])}\n{_badge(*guarded)}\n"
        f'<p class="command"><code>{_text(" ".join(document["command_line"]))}</code></p>\n</header>'
    )


def _name(document: Document) -> str:
    return f"run {document['run_id']}" if document["run_id"] else "a launch that was refused"


def _summary(document: Document) -> str:
    launch = document["launch"]
    facts = [
        ("host", document["host"]),
        ("user", document["user"]),
        ("began", _moment(document["began"])),
        ("took", _duration(document["seconds"])),
        ("exit status", str(document["status"])),
        ("guard", _guard(document)),
    ]
    if launch:
        facts.append(("umask", launch["umask"]))
    if document["key"]:
        facts.append(("key", f"{document['key']['fingerprint']} of {document['key']['source']}"))
    if document["nodes"]:
        facts.append(("nodes", nodes_guarded(document["nodes"]["guarded"], document["nodes"]["of"] or 0)))
    cells = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in facts)
    reason = f'<p class="none">{_text(document["reason"])}</p>' if document["reason"] else ""
    return f'<section>\n<dl class="facts">{cells}</dl>\n{reason}{_phases(document["timeline"])}</section>'


def _phases(timeline: Sequence[Document]) -> str:
    """Return a bar for the length of each part of the run; nothing where there was but one."""
    at = {event["kind"]: event["seconds"] for event in reversed(timeline)}
    found = [(label, at[last] - at[first]) for first, last, label in _PHASES if {first, last} <= at.keys()]
    if len(found) < 2:
        return ""
    parts = (
        f'<div class="{"job" if label == "guarded" else "other"}" style="flex: {max(seconds, 0.001):.3f} 1 0">'
        f"<i></i><span>{_text(label)}</span><span>{_text(_duration(seconds))}</span></div>"
        for label, seconds in found
    )
    return f'<div class="phases">{"".join(parts)}</div>'


def _timeline(document: Document) -> str:
    items = "\n".join(
        f'<li class="{_shade(event, document["status"])}">'
        f'<time datetime="{_text(event["at"])}">{_text(_offset(event["seconds"]))}</time>'
        f"<i></i><span>{_text(event['text'])}</span></li>"
        for event in document["timeline"]
    )
    return f'<section>\n<h2>Time line</h2>\n<ol class="line">\n{items}\n</ol>\n</section>'


def _shade(event: Document, status: int) -> str:
    """Return the class of an event; how the launch ended has a colour of its own."""
    kind: str = event["kind"]
    if kind == "ended":
        return "failure" if status else "success"
    return kind if kind.isalpha() else "other"


def _denied(document: Document) -> str:
    denied = document["denied"]
    if denied is None:
        if not document["protected"]:
            return ""
        return _section("Turned away", '<p class="none">not known: no guard answered at the end</p>')
    rows = [
        (_code(denial["source"]), _number(denial["port"] or "unknown"), _number(denial["packets"])) for denial in denied
    ]
    return _section("Turned away", _table(("source", "port", "attempts"), rows, right=(1, 2)) or _none("nobody"))


def _plan(launch: Document | None, *, has_key: bool) -> Iterable[str]:
    if launch is None:
        return
    policy, rendezvous = launch["policy"], launch["rendezvous"]
    ports = [(_number(_range(port)), _text(port["purpose"])) for port in policy["ports"]]
    for opening in policy["public"]:
        whom = ", ".join(map(_shortest, opening["networks"])) or "every host"
        ports = [row for row in ports if row[0] != _number(_range(opening))]
        ports.append((_number(_range(opening)), _text(f"public (--public): open to {whom} as well")))
    ports.append((_short("any other"), _text("chosen at random by torch, gloo or NCCL")))
    peers = "".join(f"<li>{_code(_shortest(peer))}</li>" for peer in policy["peers"])
    nobody = "none that are named: whoever has the job's key" if has_key else "none: no other host may connect"
    listed = f'<ul class="bare">{peers}</ul>' if peers else _none(nobody)
    through = f"{', '.join(policy['interfaces']) or 'any interface'} ({launch['entrance']})"
    named = f'<p class="none">named by {_text(launch["peers"]["source"])}; through {_text(through)}</p>'
    meeting = rendezvous["backend"] + (f" at {rendezvous['endpoint']}" if rendezvous["endpoint"] else "")
    command = f"<p><code>{_text(' '.join(launch['command']))}</code></p>"
    elsewhere = "".join(f"<li>{_text(line)}</li>" for line in launch["not_guarded"])
    command += f"<ul>{elsewhere}</ul>" if elsewhere else ""
    yield (
        '<div class="pair">'
        + _section("Ports", _table(("port", "for"), ports))
        + _section("Who may connect", listed + named)
        + "</div>"
    )
    yield _section("What was launched", f'{command}<p class="none">rendezvous: {_text(meeting)}</p>')


def _layers(document: Document) -> str:
    if not document["protected"]:
        return _section("Layers", _none("none: every port was open to every host")) if document["launch"] else ""
    rows = [(_short(layer["backend"]), _code(layer["name"])) for layer in document["layers"]]
    notes = "".join(f'<p class="none">{_text(note)}</p>' for note in document["notes"])
    return _section("Layers", _table(("layer", "in the kernel"), rows) + notes)


def _findings(title: str, findings: Sequence[Document]) -> str:
    blocks = "".join(
        f'<div class="finding"><strong>{_text(finding["what"])}</strong><p>{_text(finding["why"])}</p>'
        f"{_code(finding['mend'])}</div>"
        for finding in findings
    )
    return _section(title, blocks) if blocks else ""


def _footer(document: Document) -> str:
    versions = f"securerun {document['securerun'] or ''}" + (
        f", torch {document['torch']}" if document["torch"] else ""
    )
    return f"<footer>{_text(versions)}; times are UTC; written {_text(_moment(document['ended']))}</footer>"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML already; nothing where there are no rows."""
    if not rows:
        return ""
    sides = ['class="right"' if number in right else 'class="left"' for number in range(len(headings))]
    head = "".join(f"<th {side}>{_text(heading)}</th>" for side, heading in zip(sides, headings))
    body = "\n".join(
        "<tr>" + "".join(f"<td {side}>{cell}</td>" for side, cell in zip(sides, row)) + "</tr>" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _guard(document: Document) -> str:
    if document["guard"]:
        return f"started {document['guard']}"
    ways = [layer["name"] for layer in document["layers"] if layer["backend"] == NAMESPACE]
    return f"none needed: in a network of its own, {ways[0]}" if ways else "none"


def _badge(text: str, shade: str) -> str:
    return f'<span class="badge {shade}">{_text(text)}</span>'


def _none(text: str) -> str:
    return f'<p class="none">{_text(text)}</p>'


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _short(text: str) -> str:
    return f'<span class="short">{_text(text)}</span>'


def _shortest(network: str) -> str:
    """Return a network of one address as that address."""
    return network.removesuffix("/128" if ":" in network else "/32")


def _number(value: object) -> str:
    return f'<span class="number">{_text(str(value))}</span>'


def _range(port: Document) -> str:
    return span(port["first"], port["last"])


def _moment(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")


def _offset(seconds: float) -> str:
    return f"+{seconds:.2f} s" if seconds < 3600 else f"+{_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _text(text: str) -> str:
    """Any text as HTML that shows it, and does nothing: for content and for quoted attributes."""
    return escape(printable(text))
