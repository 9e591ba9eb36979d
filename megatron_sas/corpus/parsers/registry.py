"""The parsers by kind. A new one is a module of this package with its class, and a line here."""

from __future__ import annotations

from typing import Any

from megatron_sas.core.cli import InputError, kind_and_reason
from megatron_sas.corpus.parsers.base import Parser
from megatron_sas.corpus.parsers.given import ConlluParser, NoParser
from megatron_sas.corpus.parsers.products import SPACY
from megatron_sas.corpus.parsers.spacy import SpacyParser
from megatron_sas.corpus.parsers.stanza import StanzaParser

PARSERS: dict[str, type[Parser]] = {
    "spacy": SpacyParser,
    "stanza": StanzaParser,
    "conllu": ConlluParser,
    "none": NoParser,
}


def parser_usage(*, remarks: bool = False) -> str:
    """What can follow --parser, for messages, and with remarks for --help."""
    notes = {kind: f" ({parser.remark})" if remarks and parser.remark else "" for kind, parser in PARSERS.items()}
    return _listed([_usage(kind) + note for kind, note in notes.items()])


def predictor_usage() -> str:
    """The same for the parsers that predict heads."""
    return _listed([_usage(kind) for kind, parser in PARSERS.items() if parser.heads == "predicted"])


def _usage(kind: str) -> str:
    return f"{kind}:{PARSERS[kind].argument}".rstrip(":")


def _listed(items: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def parser_class(specification: str) -> tuple[type[Parser], str]:
    """The class of parser that `KIND` or `KIND:ARGUMENT` names, and the argument; `InputError` for anything else."""
    kind, colon, argument = specification.partition(":")
    parser = PARSERS.get(kind)
    if parser is None or (bool(parser.argument) != bool(argument)) or (colon and not argument):
        raise InputError(f"--parser {specification}: must be {parser_usage()}")
    return parser, argument


def check_predicts(specification: str) -> None:
    """Raise `InputError` for a parser that does not parse text."""
    if parser_class(specification)[0].heads != "predicted":
        raise InputError(f"--parser {specification}: makes no parses of its own; give {predictor_usage()}")


def make_parser(specification: str, ops: str = SPACY) -> Parser:
    """Load the parser, with the library of its products (`Parser.takes_ops`); `InputError` when it cannot be loaded."""
    parser, argument = parser_class(specification)
    try:
        return parser(*(argument,) * bool(argument), *(ops,) * parser.takes_ops)
    except InputError:
        raise
    except Exception as error:  # of the library's own kinds: files cut off, another version, no memory on the device
        raise InputError(f"--parser {specification}: cannot be loaded ({kind_and_reason(error)})") from error


def describe_parser(specification: str, ops: str = SPACY) -> dict[str, Any]:
    """Name, versions and SHA-256 of a parser for the header, and as `ops` the library of its products if it is not
    spaCy's own; `InputError` when it does not exist or cannot parse so."""
    parser, argument = parser_class(specification)
    return {"name": specification, **parser.describe(argument, *(ops,) * parser.takes_ops)}
