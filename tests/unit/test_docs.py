"""The documentation says what the code has: commands, settings, keys, exit codes, flows, packages, tests, links."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cyclopts
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from phasewise.cli.app import EXIT_CODES, app
from phasewise.orchestration.deployments import list_deployments
from phasewise.project.config import _ProjectFile, load_project
from phasewise.settings import Settings
from phasewise.sources.registry import BUILT_IN as SOURCES

CHECKOUT = Path(__file__).parents[2]
DOCS = CHECKOUT / "docs"
README = CHECKOUT / "README.md"
PAGES = sorted([*CHECKOUT.glob("*.md"), *DOCS.rglob("*.md"), *CHECKOUT.glob("examples/*/README.md")])
CODE = CHECKOUT / "src" / "phasewise"


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def read_table(text: str, *, header: str) -> list[list[str]]:
    """Return the rows of the first table whose header line begins with *header*, without the marks of code."""
    lines = text[text.index(f"\n| {header}") :].strip().splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def find_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in blocks if kind == language]


def name_page(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


# ── what the code has stands in the reference ────────────────────────────────────────────────────────────────────


def test_every_command_and_option_is_in_the_reference() -> None:
    text = read("reference/cli.md")
    sections = {
        heading.split()[1]: section
        for heading, section in re.findall(r"^### `(phasewise [^`]*)`\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    }
    missing = [name for name in app if not name.startswith("-") and name not in sections]
    for name in set(app) & set(sections):
        for argument in app[name].assemble_argument_collection():
            options = [option for option in argument.names if option.startswith("--")]
            missing += [f"{name} {option}" for option in options if f"`{option}`" not in sections[name]]

    assert not missing, f"add to docs/reference/cli.md: {missing}"
    assert not set(sections) - set(app), "docs/reference/cli.md has commands that do not exist"


def test_the_arguments_of_a_command_are_named_as_the_command_names_them() -> None:
    text = read("reference/cli.md")
    for name in app:
        if name.startswith("-"):
            continue
        arguments = [argument for argument in app[name].assemble_argument_collection() if argument.names[0][0] != "-"]
        words = [argument.name if argument.required else f"[{argument.name}]" for argument in arguments]
        assert f"### `{' '.join(['phasewise', name, *words])}`" in text


def test_whatever_shows_how_to_attach_a_catalog_in_sqlite_reads_it_through_one_connection() -> None:
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```\w+\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
        if "ATTACH 'ducklake:sqlite" in block
    ]

    assert len(blocks) >= 3
    for block in blocks:
        assert "SET GLOBAL sqlite_disable_multithreaded_scans = true" in block.partition("ATTACH 'ducklake:sqlite")[0]


def test_the_exit_codes_are_those_of_the_command() -> None:
    documented = {int(code): meaning for code, meaning in read_table(read("reference/cli.md"), header="code | meaning")}

    assert documented == {code: meaning for code, _, meaning in EXIT_CODES}


def test_every_setting_is_in_the_reference_with_its_default() -> None:
    text = read("reference/settings.md")
    documented = {
        cells[0]: cells[1]
        for line in text.splitlines()
        if line.startswith("| `PHASEWISE_")
        for cells in [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")]]
    }
    defaults = {f"PHASEWISE_{name.upper()}": field.default for name, field in Settings.model_fields.items()}

    assert sorted(documented) == sorted(defaults)
    for name, default in defaults.items():
        assert default is None or documented[name] == str(default), name


def test_every_key_of_the_project_file_is_in_the_reference_with_its_default() -> None:
    documented = {row[0]: row[1] for row in read_table(read("reference/project-file.md"), header="key | default")}
    keys = dict(list_keys(_ProjectFile))

    assert sorted(documented) == sorted(keys)
    for key, field in keys.items():
        shown = documented[key]
        assert (shown == "–") == field.is_required(), key
        if isinstance(field.default, str | int) and field.default != "":
            assert shown == json.dumps(field.default), key


def list_keys(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield ``section.key`` of every key that phasewise.toml may have; a table's own section is ``table.<name>``."""
    for name, field in model.model_fields.items():
        inner = find_model(field.annotation)
        if inner is None:
            yield f"{section}{name}", field
        else:
            if section:  # a list of records within a section is a key of it, too
                yield f"{section}{name}", field
            yield from list_keys(inner, f"{name}.<name>." if name == "table" and not section else f"{name}.")


def find_model(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [find_model(argument) for argument in getattr(annotation, "__args__", ())]
    return next((model for model in found if model is not None), None)


def test_every_scheme_of_a_source_is_in_the_reference() -> None:
    text = read("reference/sources.md")

    # postgres:// is the short form of postgresql://
    assert not [scheme for scheme in SOURCES if f"{scheme}:" not in text and scheme != "postgres"]


def test_every_make_target_is_in_the_reference_and_no_other() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE)
    documented = [row[0].removeprefix("make ") for row in read_table(read("reference/cli.md"), header="target |")]

    assert sorted(documented) == sorted(targets)


def test_the_flows_of_the_readme_are_those_that_are_deployed() -> None:
    rows = read_table(README.read_text(encoding="utf-8"), header="function | flow")
    deployed = {
        (one.entrypoint.rpartition(".")[2], one.flow_name, one.name, one.work_queue)
        for one in list_deployments((), CHECKOUT)
    }

    assert len(rows) == len(deployed)
    assert {tuple(row[:4]) for row in rows} == deployed


def list_modules(package: Path) -> set[str]:
    """Return the modules of a folder and its packages, without those whose names begin with an underscore."""
    files = {path.stem for path in package.glob("*.py")}
    return {name for name in files | {path.parent.name for path in package.glob("*/__init__.py")} if name[0] != "_"}


def test_the_architecture_names_every_package_and_module_and_no_other() -> None:
    rows = read_table(read("architecture.md").replace("`errors`, `outcomes`, `settings`", "errors"), header="package |")
    documented = {name for row in rows for name in row[0].split(", ")} | {"outcomes", "settings"}

    assert documented == list_modules(CODE)


@pytest.mark.parametrize("package", sorted(path.parent.name for path in CODE.glob("*/__init__.py")))
def test_the_row_of_a_package_names_all_of_its_modules(package: str) -> None:
    [row] = re.findall(rf"^\| `{package}` \|.*\| (.*) \|$", read("architecture.md"), flags=re.MULTILINE)

    missing = list_modules(CODE / package) - set(re.findall(r"`(\w+)`", row))

    assert not missing, f"add to the row of {package} in docs/architecture.md: {sorted(missing)}"


@pytest.mark.parametrize("package", sorted(path.parent.name for path in CODE.glob("*/__init__.py")))
def test_each_package_says_who_imports_it_and_in_which_process_it_runs(package: str) -> None:
    text = ast.get_docstring(ast.parse((CODE / package / "__init__.py").read_text())) or ""

    assert re.search(r"imports? it\b", text), "say who may import it"
    assert re.search(r"\bruns? in\b|process", text), "say in which process it runs"


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    checked = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in checked if contract["type"] == "layers")
    drawn = [block for block in find_blocks(read("architecture.md"), "") if block.startswith("cli  testing")]

    assert [[line.split() for line in block.splitlines()] for block in drawn] == [
        [layer.split(" | ") for layer in layers]
    ]


#: What each process is started as; a forkserver imports more, by its settings.
PROCESSES = {
    "supervisor": "phasewise.stack.supervisor",
    "server": "phasewise.server.app",
    "worker": "phasewise.worker.__main__",
    "forkserver": "phasewise.forkserver.server",
}


def read_picture() -> dict[str, set[str]]:
    """Return, for each process of the architecture's picture, the packages that are marked in its column."""
    [block] = [block for block in find_blocks(read("architecture.md"), "") if "└─► worker ──► forkserver" in block]
    lines = block.splitlines()
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("command  "))
    columns = {match[0].strip(): (match.start(), match.end()) for match in re.finditer(r"flow run|\w+", lines[start])}
    marked: dict[str, set[str]] = {name: set() for name in columns}
    for line in lines[start + 1 :]:
        for mark in re.finditer("[●○]", line):
            if line[0].isalpha():
                [name] = [name for name, (left, right) in columns.items() if left <= mark.start() < right]
                marked[name].add(line.split()[0])
    return marked


def test_the_picture_has_every_package() -> None:
    assert set.union(*read_picture().values()) == list_modules(CODE) - {"testing"}


@pytest.mark.timeout(240)  # a new Python with Prefect, on a machine that may be busy
@pytest.mark.parametrize("process", PROCESSES)
def test_the_picture_marks_what_a_process_imports(process: str) -> None:
    loaded = "{name.split('.')[1] for name in sys.modules if name.startswith('phasewise.')}"
    code = f"import sys, {PROCESSES[process]}; print(*{loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert set(done.stdout.split()) <= read_picture()[process]


def exists(name: str) -> bool:
    """Tell whether *name* (``phasewise.package.module.attribute``) can be imported."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:count]))
            return all(hasattr(found, part) for part in parts[count : count + 1])
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(r"phasewise(?:\.[A-Za-z_]\w*)+(?![\w-])", text))
    packages = "|".join(sorted(path.parent.name for path in CODE.glob("*/__init__.py")))
    files = {match[0] for match in re.finditer(rf"(?<=`)(?:{packages})/\w+(?=`)", text)}
    paths = set(re.findall(r"`(?:src/)?(phasewise/[\w/.]+)`", text))

    missing = [name for name in dotted if name != "phasewise.toml" and not exists(name)]
    missing += [name for name in files if not (CODE / f"{name}.py").exists()]
    missing += [name for name in paths if not (CODE.parent / name).exists()]

    assert not missing


# ── decisions, guarantees, tests ─────────────────────────────────────────────────────────────────────────────────

DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))


def test_decisions_have_one_number_each_a_heading_a_date_and_a_status_and_are_in_the_index() -> None:
    rows = []
    for page in DECISIONS:
        heading, empty, line = page.read_text(encoding="utf-8").splitlines()[:3]
        title = re.fullmatch(r"# (\d+)\. (.+)", heading)
        state = re.fullmatch(r"(20\d\d-\d\d-\d\d) · (accepted|superseded by \[\d+\]\(\d{4}-[\w.-]+\.md\))", line)
        assert title, f"{page.name}: {heading}"
        assert state, f"{page.name}: {line}"
        assert not empty
        assert page.name.startswith(f"{int(title[1]):04}-"), page.name
        rows.append([f"[{title[1]}]({page.name})", title[2], *state.groups()])

    numbers = [page.name[:4] for page in DECISIONS]
    assert len(set(numbers)) == len(numbers)
    assert read_table(read("decisions/README.md"), header="number |") == rows


def test_every_decision_that_is_named_exists() -> None:
    numbers = {int(page.name[:4]) for page in DECISIONS}
    files = [*PAGES, *CODE.rglob("*.py"), *(CHECKOUT / "tests").rglob("*.py")]
    named = [
        (file.name, int(number))
        for file in files
        for number in re.findall(r"[Dd]ecisions? (\d+)|docs/decisions/(\d{4})", file.read_text(encoding="utf-8"))
        for number in number
        if number
    ]

    assert len(named) > 10
    assert [name for name in named if name[1] not in numbers] == []


def test_every_guarantee_has_its_tests_and_every_such_test_its_guarantee() -> None:
    text = read("guarantees.md")
    sections = re.findall(r"^## (\d+)\. [^\n]+\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    documented = {int(number): set(re.findall(r"`(test_\w+)`", section)) for number, section in sections}
    written: dict[int, set[str]] = {}
    for path in (CHECKOUT / "tests").rglob("test_*.py"):
        for name in re.findall(r"def (test_g\d\d_\w+)", path.read_text(encoding="utf-8")):
            for number in re.findall(r"(?<=_)g(\d\d)(?=_)", name):
                written.setdefault(int(number), set()).add(name)

    assert list(documented) == list(range(1, len(documented) + 1))
    assert documented == written


def test_unit_tests_mirror_the_packages() -> None:
    unit = CHECKOUT / "tests" / "unit"
    strangers = []
    for path in unit.glob("*/test_*.py"):
        package = CODE / path.parent.name
        names = {name.strip("_") for name in (module.stem for module in package.glob("*.py")) if name != "__init__"}
        if "def " in (package / "__init__.py").read_text():  # the package is a module of its own name
            names.add(package.name)
        if not any(re.fullmatch(rf"test_{name}(_\w+)?", path.stem) for name in names):
            strangers.append(str(path.relative_to(CHECKOUT)))

    assert strangers == []
    assert {path.name for path in unit.iterdir() if path.is_dir() and path.name[0] != "_"} <= list_modules(CODE)


def test_every_test_that_the_documents_point_to_exists() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"def (test_\w+)\(", tests))
    named = {name for page in DOCS.rglob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}

    assert named <= existing


# ── what the documentation says is valid ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_page(page)} links to {target}"
        assert not anchor or anchor in list_anchors(found), f"{name_page(page)} links to {target}"


def list_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_another() -> None:
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            linked.add((page.parent / target).resolve())

    assert not [name_page(page) for page in DOCS.rglob("*.md") if page not in linked]


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_commands_are_such_as_the_command_line_takes(page: Path) -> None:
    for block in find_blocks(page.read_text(encoding="utf-8"), "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "phasewise":
                try:
                    app.parse_args(words[1:], exit_on_error=False, print_error=False)
                except cyclopts.CycloptsError as exc:
                    pytest.fail(f"{line}: {exc}")
            if words and words[0] == "make":
                assert re.search(rf"^{words[1]}:", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_project_files_that_are_shown_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "secret")
    monkeypatch.setenv("LAKE_PASSWORD", "secret")
    for block in find_blocks(page.read_text(encoding="utf-8"), "toml"):
        if "[project.entry-points" in block:
            continue  # a pyproject.toml
        start = "" if "[project]" in block else '[project]\nname = "x"\n[source]\nurl = "sqlite:///x"\n'
        (tmp_path / "phasewise.toml").write_text(start + block, encoding="utf-8")
        load_project(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_variables_that_are_named_exist(page: Path) -> None:
    settings = {f"PHASEWISE_{name.upper()}" for name in Settings.model_fields}
    named = set(re.findall(r"PHASEWISE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))

    assert named <= settings
