"""Loading tokenizers and telling them apart by content.

With transformers 5 a `BertTokenizerFast` is built with `vocab=` (a path or a dict). The former keyword `vocab_file=` is
swallowed without a word and leaves five special tokens, every word [UNK]; so this module is the one place that does it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.core.files import write_json_atomic
from megatron_sas.data.packed import TokenizerInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a WordPiece vocabulary file or a Hugging Face directory.

    A vocabulary file (one entry a line), or a directory that holds only `vocab.txt`, makes BERT's uncased tokenizer:
    text is lower-cased and stripped of accents. Offsets always refer to the original text.

    Raises:
        InputError: no such path; special tokens or the fast implementation missing; a cased vocabulary given as a file.
    """
    path = Path(path)
    if path.is_dir() and not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        if not (path / "vocab.txt").exists():
            raise InputError(f"{path}: has no tokenizer (tokenizer.json or vocab.txt); save it there, or give another")
        path = path / "vocab.txt"
    if not path.exists():
        raise InputError(f"{path}: no such vocabulary file or tokenizer directory; check --tokenizer")
    if path.suffix in (".json", ".model") and path.is_file():
        raise InputError(f"{path}: is no vocabulary with one entry a line; give the directory it is in, {path.parent}")
    tokenizer = _from_directory(path) if path.is_dir() else _from_vocabulary(path)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{path}: this tokenizer has no fast implementation, so no offsets; save it as tokenizer.json")
    names = ("pad", "unk", "cls", "sep", "mask")
    missing = [name for name in names if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise InputError(f"{path}: the tokenizer has no {', '.join(missing)} token; a masked LM needs all of {names}")
    return tokenizer


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    from transformers import BertTokenizerFast

    try:
        entries = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); give a vocabulary with one entry a line") from error
    entries = [entry.rstrip("\r") for entry in entries]
    if entries and not entries[-1]:
        entries.pop()
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    if len(vocabulary) != len(entries):
        double = next(entry for number, entry in enumerate(entries) if vocabulary[entry] != number)
        raise InputError(f"{path}:{vocabulary[double] + 1}: entry {double!r} occurs twice; ids would be ambiguous")
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing; give a BERT vocabulary with one entry a line")
    cased = next((entry for entry in entries if entry.isalpha() and entry != entry.lower()), None)
    if cased:
        raise InputError(
            f"{path}: entry {cased!r} has capitals, but a vocabulary file is read as uncased; "
            "give the tokenizer's Hugging Face directory instead"
        )
    return BertTokenizerFast(vocab=vocabulary)


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: not a usable tokenizer directory ({reason})") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path, max_length: int | None) -> None:
    """Write the tokenizer's files as transformers 4 and 5 read them; texts are cut at `max_length` tokens if at all.

    Raises:
        InputError: what was written does not read back as the same tokenizer.
    """
    if max_length is not None:
        tokenizer.model_max_length = max_length
    write_tokenizer(tokenizer, directory)
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "WordPiece":
        with _os_errors(directory):
            model.save(str(directory))  # vocab.txt, which slow tokenizers and other programs read
    path = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which 5 understands too
    write_json_atomic(path, config)
    if tokenizer_hash(load_tokenizer(directory)) != tokenizer_hash(tokenizer):
        raise InputError(f"{directory}: the tokenizer does not survive saving; use another version of transformers")


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """`save_pretrained`, but a full disk is an `OSError`."""
    with _os_errors(directory):
        tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _os_errors(directory: Path) -> Iterator[None]:
    """Files that cannot be written are a bare `Exception` in the library `tokenizers`; here they are an `OSError`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(errno.EIO, first_line(error), str(directory)) from error


def knows_words(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it cuts text into words before it cuts these into pieces; some take a whole text for one word."""
    backend = tokenizer.backend_tokenizer
    text = "a b" if backend.normalizer is None else backend.normalizer.normalize_str("a b")
    return backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str(text)) > 1


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of ids, added tokens included: the largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hexadecimal) of what decides which ids a text gets: model with vocabulary, normaliser, pre-tokeniser,
    added and special tokens. Saving and loading, truncation, padding and decoding do not change it."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}
    content["vocabulary"] = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    content["special"] = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_info(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> TokenizerInfo:
    """The record of `tokenizer` for the header of packed data."""
    return TokenizerInfo(
        path=str(Path(path).resolve()),
        hash=tokenizer_hash(tokenizer),
        vocab_size=vocab_size(tokenizer),
        pad_id=tokenizer.pad_token_id,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        mask_id=tokenizer.mask_token_id,
        unk_id=tokenizer.unk_token_id,
    )


def plain_text_tokenizer(serialised: str) -> Tokenizer:
    """The `tokenizers` object for whole texts, from `backend_tokenizer.to_str()`.

    Neither cuts nor pads, and "[SEP]" written in a text is five characters of text, not a document boundary.
    """
    from tokenizers import Tokenizer

    parts = json.loads(serialised)
    if parts["model"].get("type") == "Unigram":
        serialised = json.dumps(_without_special_pieces(parts), ensure_ascii=False)
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_special_pieces(parts: dict[str, Any]) -> dict[str, Any]:
    """A serialised unigram tokenizer whose model cannot use its special tokens as pieces of a text.

    They stand among its pieces with the best score of all, so that "[SEP]" in a text would become one. SentencePiece
    leaves them out of its search; here they get names that no text contains. (A very bad score would not do: the model
    takes it for the worst of a piece, and prices unknown characters, such as "[" may be one, still worse.)
    """
    pieces = parts["model"]["vocab"]
    special = [token for token in parts["added_tokens"] if token["special"] and token["id"] < len(pieces)]
    for token in special:
        pieces[token["id"]][0] = f"\0{token['content']}"  # U+0000 is taken out of texts as they are read
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token not in special]
    parts["post_processor"] = None
    return parts
