"""The benchmarks: what they write, what is drawn from it, and that the quick ones run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import kernel
import pytest
from checkout import CHECKOUT

BENCHMARKS = CHECKOUT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import connect  # noqa: E402
import exposure  # noqa: E402
import findings  # noqa: E402
import layers  # noqa: E402
import page  # noqa: E402
import pictures  # noqa: E402
from findings import Finding, finding  # noqa: E402
from hosts import Network  # noqa: E402

from securerun.firewall.policy import Policy  # noqa: E402
from securerun.linux.networks import collapse  # noqa: E402

FIELDS = {"name", "what", "unit", "samples", "median", "spread", "ratio", "against", "goal", "goal_of", "met"}


def test_a_goal_is_for_the_ratio_where_there_is_one() -> None:
    none = finding("none", "none", "us", [10.0, 12.0, 11.0])
    slower = finding("slower", "slower", "us", [12.0, 13.0, 12.0], against=none, goal=1.03)
    assert (slower.ratio, slower.against, slower.goal_of, slower.met) == (1.0909, "none", "ratio", False)
    assert finding("alone", "alone", "s", [1.5], goal=2.0).met
    assert finding("alone", "alone", "s", [1.5]).met is None


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = [finding("one", "one", "s", [1.0, 2.0, 4.0]), finding("two", "two", "s", [3.0], goal=2.0)]
    path = tmp_path / "results" / "some.json"
    findings.report("some", found, str(path))
    document = json.loads(path.read_text())
    assert document["benchmark"] == "some"
    assert {"cpus", "kernel", "python", "torch"} <= document["machine"].keys()
    assert all(each.keys() == FIELDS for each in document["findings"])
    assert findings.read(path) == {each.name: each for each in found}


def test_each_finding_is_one_line(tmp_path: Path) -> None:
    """Measuring anew changes a line for each finding, and none for each sample."""
    findings.report("some", [finding(name, name, "s", [1.0, 2.0]) for name in "abc"], str(tmp_path / "some.json"))
    for file in (tmp_path / "some.json", *sorted((BENCHMARKS / "results").glob("*.json"))):
        document = json.loads(file.read_text())
        first, *lines, last = file.read_text().splitlines()
        assert [json.loads(line.removesuffix(",")) for line in lines] == document["findings"], file.name
        assert json.loads(f"{first}{last}") == {**document, "findings": []}, file.name


def stored() -> dict[str, list[Finding]]:
    """What every benchmark that a picture is drawn from might have found."""
    names = ("none", "control", *(f"{layer}.{count}" for layer in connect.LAYERS for count in connect.COUNTS))
    return {
        "connect": [finding(f"connect.latency.{name}", name, "us", [20.0, 21.0, 22.0]) for name in names],
        "exposure": [
            finding(f"exposure.{way}.stranger.{family}{kind}", way, "ports", [count])
            for way in exposure.WAYS
            for family in ("IPv4", "IPv6")
            for kind, count in (("", 3), (".seen", 5))
        ],
        "layers": [
            finding(f"layers.{name}.random.install.{size}", name, "ms", [size / 1000])
            for name in (*layers.LAYERS, *layers.OTHERS)
            for size in layers.SIZES
        ],
        "launch": [
            finding(f"launch.steps.{launcher}.{step}", step, "s", [0.1])
            for launcher in ("torchrun", "securerun")
            for step in ("import torch", "exit", "policy to layers")
        ],
    }


def test_every_picture_is_drawn_from_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in stored().items():
        findings.report(name, found, str(tmp_path / f"{name}.json"))
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--results", str(tmp_path), "--into", str(tmp_path / "drawn")])
    pictures.main()
    assert {file.stem for file in (tmp_path / "drawn").iterdir()} == set(pictures.PICTURES)
    for file in (tmp_path / "drawn").iterdir():
        drawing = ElementTree.parse(file).getroot()  # noqa: S314 - we have just written it
        words = " ".join(drawing.itertext())
        assert (drawing.findtext("{http://www.w3.org/2000/svg}title") or "no title") in words
        assert "prefers-color-scheme: dark" in words


def test_pictures_of_what_was_not_measured_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--results", str(tmp_path), "--into", str(tmp_path / "drawn")])
    pictures.main()
    assert list((tmp_path / "drawn").iterdir()) == []


def test_page_and_pictures_show_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures anew, or changes what is drawn, commits the page and the pictures with it."""
    docs = BENCHMARKS.parent / "docs"
    assert (docs / "benchmarks.md").read_text() == page.page(BENCHMARKS / "results")
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--into", str(tmp_path)])
    pictures.main()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (docs / "pictures").iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_text() == (docs / "pictures" / file.name).read_text(), file.name


def test_every_benchmark_has_its_section_and_a_missed_goal_its_reason() -> None:
    text = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) == set(names_in_script())
    reasons = (BENCHMARKS / "README.md").read_text().partition("## What is missed, and why")[2]
    for name in names_in_script():
        missed = [each for each in findings.read(BENCHMARKS / "results" / f"{name}.json").values() if each.met is False]
        assert not missed or f"**`{name}`" in reasons, missed


def test_a_bar_of_ports_has_as_many_squares_as_there_were_ports() -> None:
    drawing = pictures.exposure({each.name: each for each in stored()["exposure"]}).svg()
    assert drawing.count('class="open"') == 3 * 2 * 3
    assert drawing.count('class="closed"') == 3 * 2 * 2


@pytest.mark.parametrize("layer", [*layers.LAYERS, "nft -f", "iptables-restore", "one iptables call a rule"])
def test_a_layer_is_measured_there_and_back(root_and_tools: None, layer: str) -> None:
    if layer in ("nftables", "nft -f"):
        kernel.require(kernel.OWNED_TABLES)
    policy = Policy(layers.RUN, layers.PORTS, collapse(layers.addresses(40, "random")))
    with Network("alone") as network:
        seconds = layers.measure_one(network["alone"], {**layers.LAYERS, **layers.OTHERS}[layer], policy)
        assert seconds.install > 0
        after = network["alone"].snapshot(legacy=True)
    assert "securerun" not in str(after).lower()


def names_in_script() -> list[str]:
    found = re.search(r"^all=\((.*)\)$", (BENCHMARKS.parent / "scripts" / "bench.sh").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1).split()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", names_in_script())
def test_each_benchmark_of_the_script_is_one_command_and_stands_in_the_page(name: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"--json", "--quick"} <= set(re.findall(r"--[a-z]+", done.stdout))
    assert f"| `{name}` |" in (BENCHMARKS / "README.md").read_text()


def test_contiguous_and_random_addresses_are_as_many_as_asked_for() -> None:
    for shape in layers.SHAPES:
        found = layers.addresses(1000, shape)
        assert len(set(found)) == 1000
    assert len(collapse(layers.addresses(1000, "contiguous"))) < 20
