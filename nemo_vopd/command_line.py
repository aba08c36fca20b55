"""What people type, before and after Hydra reads it: help, texts with any characters, mistakes and what was meant."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError

CONF = Path(__file__).resolve().parents[1] / "conf"
_FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--hydra-help", "--version")
_NAME, _FOLDER = ("--config-name", "-cn"), ("--config-dir", "-cd", "--config-path", "-cp")
_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", *_NAME, *_FOLDER)


@dataclasses.dataclass(frozen=True)
class Command:
    """One recipe as people call it."""

    schema: type
    """Dataclass of its options."""
    config_name: str | None
    """Configuration that is used where none is named; None: one has to be named."""
    word: str | None = None
    """Option whose value may stand first and alone (`benchmark.py loss` for `part=loss`)."""
    texts: tuple[str, ...] = ()
    """Options whose values are taken as they are typed, whatever characters they hold."""

    def configurations(self) -> list[str]:
        """Names of the files in conf/ that are made for this command."""
        schema = _base(CONF / f"{self.config_name or 'train'}.yaml")
        return sorted(file.stem for file in CONF.glob("*.yaml") if _base(file) == schema)


class Option(NamedTuple):
    """One option of a schema."""

    name: str
    default: Any
    kind: str
    """Its type as the schema writes it."""
    meaning: str
    rule: str
    """Its bounds in words."""

    @property
    def is_free(self) -> bool:
        """Whether it takes options that are not listed."""
        return isinstance(self.default, dict) or self.kind == "Any"


def options(schema: type, prefix: str = "") -> Iterator[Option]:
    """Every option of the dataclass `schema`, those of dataclasses within it under their full names."""
    meanings = _meanings(schema)
    for one in dataclasses.fields(schema):
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        name = prefix + one.name
        if dataclasses.is_dataclass(default):
            yield from options(type(default), f"{name}.")
        else:
            rule = one.metadata["bounds"].rule if "bounds" in one.metadata else ""
            yield Option(name, default, str(one.type), meanings.get(one.name, ""), rule)


def _meanings(schema: type) -> dict[str, str]:
    """Field -> the docstring below it, for the dataclass and those it extends."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def help_text(command: Command, usage: str, more: str = "") -> str:
    """The answer to --help: usage, configurations, the command's own options, then those of a run that it takes."""
    everything = list(options(command.schema))
    of_a_run = {option.name for option in options(Config)} if command.schema is not Config else set()
    own = [option for option in everything if option.name not in of_a_run]
    parts = [usage.strip(), more.strip()]
    if len(names := command.configurations()) > 1:
        first = [f"  {name:18} {_comment(CONF / f'{name}.yaml')}" for name in names]
        parts.append("Configurations (--config-name NAME, files in conf/):\n" + "\n".join(first))
    parts.append("Options (NAME=VALUE):\n" + "\n".join(map(_described, own)))
    if len(own) < len(everything):
        groups = sorted({option.name.split(".")[0] for option in everything} - {o.name.split(".")[0] for o in own})
        parts.append(f"Options of a run, too ({', '.join(groups)}): see recipes/train_vopd.py --help")
    parts.append("With --cfg job the command prints all its options and their values, and does nothing else.")
    return "\n\n".join(part for part in parts if part)


def _described(option: Option) -> str:
    values = option.default if isinstance(option.default, dict) else {"": option.default}
    lines = [f"  {option.name}{'.' * bool(key)}{key} = {_shown(value)}" for key, value in values.items()]
    meaning = f"{option.meaning} ({option.rule})" if option.rule else option.meaning
    return "\n".join([*lines, *textwrap.wrap(meaning, 116, initial_indent=6 * " ", subsequent_indent=6 * " ")])


def _shown(value: object) -> str:
    """A default as it would be typed."""
    if value == "???":
        return "(required)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _comment(file: Path) -> str:
    """The first sentence of the comment at the top of a configuration."""
    lines = [line[2:] for line in file.read_text().split("defaults:")[0].splitlines() if line.startswith("# ")]
    return re.split(r"(?<=[.:;]) ", " ".join(lines))[0].rstrip(".:;")


def _base(file: Path) -> str:
    """The schema that a configuration begins with."""
    found = re.search(r"^defaults:\n\s+- (\w+)", file.read_text() if file.is_file() else "", flags=re.MULTILINE)
    return found[1] if found else ""


def read(arguments: list[str], command: Command) -> tuple[list[str], dict[str, str]]:
    """(`arguments` for Hydra, value of each option in `command.texts` that was given). Raises OptionError."""
    if command.word is not None and arguments and re.fullmatch(r"\w+", arguments[0]):
        arguments = [f"{command.word}={arguments[0]}", *arguments[1:]]
    arguments, texts = _named_configuration(arguments, command), {}
    known, overrides, flags = {option.name: option for option in options(command.schema)}, [], []
    for before, argument, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if before in _WITH_VALUE:
            flags.append(argument)
        elif argument.startswith("-"):
            _check_flag(name)
            flags.append(argument)
        elif argument.startswith("~"):
            overrides.append(argument)
        elif not equals:
            raise OptionError(argument, ..., "is not of the form option=value", "see --help")
        elif name in command.texts:
            texts[name] = _unquoted(value)
        elif value.count("[") + value.count("{") > value.count("]") + value.count("}") and re.match(r"[^-=]+$", after):
            raise OptionError(name, value, "is cut at a space", f"put quotes around it, '{argument} {after} ...'")
        else:
            overrides.append(_override(name, value, known))
    return [*overrides, *flags], texts  # Hydra wants its own flags together


def _check_flag(flag: str) -> None:
    if flag in ("-m", "--multirun"):
        rule = "starts several runs in one process, and a run needs a process and a folder of its own"
        raise OptionError(flag, ..., rule, "start one command for each value, each with its own folder or output")
    if flag not in (*_FLAGS, *_NAME, *_FOLDER):
        raise OptionError(flag, ..., "is no flag of this command", "write options as NAME=VALUE; see --help")


def _named_configuration(arguments: list[str], command: Command) -> list[str]:
    """`arguments` with the name of a configuration as Hydra wants it, and a check that it is one of this command."""
    known = command.configurations()
    choice = f"choose one of {', '.join(known)}"
    named = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] in _NAME]
    if not named:
        if command.config_name is None:
            raise OptionError("--config-name", ..., "says which configuration to use, and none was given", choice)
        return arguments
    i = named[-1]
    flag, equals, name = arguments[i].partition("=")
    if not equals:
        name = arguments[i + 1] if i + 1 < len(arguments) else ""
    plain = re.sub(rf"^({re.escape(str(CONF))}|(\./)?conf)/|\.ya?ml$", "", name)
    elsewhere = any(argument.partition("=")[0] in _FOLDER for argument in arguments)
    if plain not in known and not elsewhere:
        file = Path(name)
        if file.suffix in (".yaml", ".yml") and file.is_file():
            choice = f"write --config-dir {file.parent.absolute()} --config-name {file.stem}"
        raise OptionError(flag, name or "?", "is no configuration of this command", choice)
    values = {j + 1 for j in named if "=" not in arguments[j]}
    rest = [argument for j, argument in enumerate(arguments) if j not in named and j not in values]
    return [*rest, f"--config-name={plain}"]  # the last one counts


def _unquoted(text: str) -> str:
    """`text` without the one pair of quotes around the whole of it that Hydra asks for."""
    found = re.fullmatch(r"(['\"])(.*)\1", text, flags=re.DOTALL)
    if found is None or re.search(rf"(?<!\\){found[1]}", found[2]):
        return text
    return found[2].replace("\\" + found[1], found[1])


def _override(name: str, value: str, known: dict[str, Option]) -> str:
    """The override in Hydra's grammar: a text that Hydra would not read as one gets quotes."""
    name, typed = name.lstrip("+"), name
    option, ends = known.get(name), [i for i, letter in enumerate(name) if letter == "."]
    # NeMo's options and others that are not listed here: Hydra wants a plus where they are new
    free = any(name[:end] in known and known[name[:end]].is_free for end in ends)
    name = f"++{name}" if free else typed if (CONF / name).is_dir() else name
    try:
        (override,) = OverridesParser.create().parse_overrides([f"{name}={value}"])
        if not override.is_sweep_override():
            return f"{name}={value}"
        several = True
    except OverrideParseException:
        several = False
    if free or (option is not None and option.kind in ("str", "str | None", "Any")):
        quoted = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return f"{name}='{quoted}'"
    if several:
        rule = "is several values, and one command is one run"
        raise OptionError(name, value, rule, "give one of them, or [A,B] for a list")
    raise OptionError(name, value, "cannot be read as a value", "put quotes around it: once for the shell, once within")


def taken_literally(text: str) -> str:
    """`text` so that OmegaConf reads it as it is: `${` begins no interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def did_you_mean(name: str, schema: type) -> str:
    """Where to look for the option that `name` may have meant."""
    names = [option.name for option in options(schema)]
    group, _, leaf = name.rpartition(".")
    same = [known for known in names if known.rpartition(".")[2] == leaf]
    close = same or difflib.get_close_matches(name, names, n=3, cutoff=0.75)
    if close:
        return f"did you mean {' or '.join(close[:3])}?"
    members = [known[len(group) + 1 :] for known in names if known.startswith(f"{group}.")]
    if group and members:
        return f"{group} has {', '.join(members)}"
    return f"there are {', '.join(dict.fromkeys(known.split('.')[0] for known in names))}; see --help"


def explain(error: Exception, command: Command) -> str:
    """One line with option, value, rule and remedy from an error of Hydra or OmegaConf."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ else ""
    if group := re.search(r"Could not find '([\w/]+)/([^/']+)'", text):
        name, value = group.groups()
        choices = ", ".join(sorted(file.stem for file in (CONF / name).glob("*.yaml")))
        return f"{name}={value}: there is no conf/{name}/{value}.yaml; choose one of {choices or 'the files there'}"
    found = re.search(r"[Cc]ould not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text + " " + cause)
    name = found[1] if found else ""
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    typed = next((a for a in overrides if name and a.lstrip("+~").split("=")[0] == name), name or "configuration")
    typed = typed.lstrip("+~")
    if "No match in the defaults list" in text:
        choices = ", ".join(sorted(file.stem for file in (CONF / name).glob("*.yaml")))
        return f"{typed}: this configuration has no {name} yet; write +{typed}" + f" (one of {choices})" * bool(choices)
    if "is not in struct" in text + cause or "not in '" in text + cause:
        return f"{typed}: no such option; {did_you_mean(name, command.schema)}"
    reason = (cause or text).split(" full_key:")[0]
    if "is not a subclass of" in reason:
        return f"{typed}: {name} is a group of options; {did_you_mean(name + '.?', command.schema)}"
    if "is not Optional" in reason:
        reason = "needs a value"
    if wrong := re.search(r"of type '\w+' could not be converted to (\w+)", reason):
        kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
        reason = f"must be {kinds.get(wrong[1], wrong[1])}"
    meaning = next((option.meaning for option in options(command.schema) if option.name == name), "")
    return f"{typed}: {reason}; {meaning or 'see --help'}"
