"""Loading tokenizers and telling them apart by content.

With transformers 5 a `BertTokenizerFast` is built with `vocab=` (a path or a dict). The former keyword `vocab_file=` is
swallowed without a word and leaves five special tokens, every word [UNK]; so this module is the one place that does it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.core.files import write_json_atomic
from megatron_sas.data.packed import TokenizerIdentity, TokenizerInfo

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_NAMES = ("pad", "unk", "cls", "sep", "mask")

# Cut into tokens for `tokenizer_digest`, which headers and checkpoints hold: never change it.
_PROBE = (
    "The QUICK brown Fox's e-mail: café, CAFÉ, cafe\u0301, naïve, Straße, STRASSE, İstanbul, ﬁne",
    "  spaces  two\tTab\u00a0no-break\u3000wide\u200bzero\u00adsoft \u2581 ##ing ▁the Ġthe ",
    "\u0007bell\u007fdelete\u0085next\ufffdreplaced\ufeffmark",
    "中文字 テスト ｶﾅ 한국어 Русский ελληνικά עברית हिन्दी ไทย",
    "3.14 1,000 10% $5 €7 x² ½ “quoted” ‘single’ – — … #tag @user a_b <b> {c} ~ ^ \\ / | can't don’t",
    "😀 👩\u200d🔬 🇩🇪 e\u0301\u0323 ❤\ufe0f",
    "[PAD] [UNK] [CLS] [SEP] [MASK] [mask] x[SEP]y <s> </s> <pad> <unk> <mask>",
    "a" * 99 + " " + "a" * 100 + " " + "a" * 101,
)
_PROBED_ENTRIES = 1000

_warned: set[Path] = set()


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
    if missing := [name for name in SPECIAL_NAMES if getattr(tokenizer, f"{name}_token_id") is None]:
        raise InputError(
            f"{path}: the tokenizer has no {', '.join(missing)} token; a masked LM needs all of {SPECIAL_NAMES}"
        )
    if not _knows_a_word(tokenizer):
        raise InputError(
            f"{path}: no word is among the tokenizer's {len(tokenizer)} entries; put the model's tokenizer.json or "
            "vocab.txt there"
        )
    if _drops_unknown_characters(tokenizer):
        raise InputError(
            f"{path}: its BPE has no unknown token, so it drops characters that it lacks; name one of its entries as "
            "model.unk_token in tokenizer.json"
        )
    # Settings of the last call of whoever saved it, which transformers writes too and other programs obey.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    from transformers import BertTokenizerFast

    try:
        entries = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); give a vocabulary with one entry a line") from error
    entries = [entry.rstrip("\r") for entry in entries]
    if not entries[-1]:
        entries.pop()
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    if len(vocabulary) != len(entries):
        double = next(entry for number, entry in enumerate(entries) if vocabulary[entry] != number)
        raise InputError(f"{path}:{vocabulary[double] + 1}: entry {double!r} occurs twice; ids would be ambiguous")
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
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
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        _warn_of_other_reading(path, tokenizer)
        return tokenizer
    except Exception as error:  # `tokenizers` raises bare ones, for instance for an empty vocab.txt
        raise InputError(
            f"{path}: not a usable tokenizer directory ({first_line(error)}); put the model's tokenizer.json or "
            "vocab.txt there"
        ) from error


def _warn_of_other_reading(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Warn on stderr, once, about a tokenizer that does something else than its tokenizer.json holds.

    transformers 5 rebuilds BERT's tokenizers from tokenizer_config.json, and lower-cases where that has no setting.
    """
    file = path / "tokenizer.json"
    if path in _warned or not file.is_file() or not getattr(tokenizer, "is_fast", False):
        return
    written, used = json.loads(file.read_text(encoding="utf-8")), _parts(tokenizer)
    if all(written.get(name) == used[name] for name in ("normalizer", "pre_tokenizer")):
        return
    vocabulary = _vocabulary(tokenizer)
    if _behaviour(written, vocabulary) != _behaviour(used, vocabulary):
        _warned.add(path)
        print(
            f"warning: {file}: transformers reads it with another normalisation than it holds, that of "
            "tokenizer_config.json; set do_lower_case and strip_accents there to what the model was trained with",
            file=sys.stderr,
        )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, directory: Path, max_length: int | None, token_types: bool = True
) -> None:
    """Write the tokenizer's files as transformers 4 and 5 read them; texts are cut at `max_length` tokens if at all.

    Without `token_types` it makes no `token_type_ids`, for models that take none.

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
    if not token_types:
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json_atomic(path, config)
    if not tokenizer_identity(load_tokenizer(directory)).matches(tokenizer_identity(tokenizer)):
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
    """Whether it cuts text into words before it cuts these into tokens; some take a whole text for one word."""
    backend = tokenizer.backend_tokenizer
    text = "a b" if backend.normalizer is None else backend.normalizer.normalize_str("a b")
    return backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str(text)) > 1


def space_before_words(tokenizer: PreTrainedTokenizerFast) -> str:
    """What stands before a word that follows another when words are cut one by one: " " or nothing.

    Byte-level BPE (RoBERTa, ModernBERT) makes the space a part of the word after it, so that a word within a text has
    other tokens than one that begins a text. Other tokenizers drop the space, or put it before every word themselves.
    """
    first, alone, spaced, both = (encoding.ids for encoding in encode_texts(("a", "b", " b", "a b"), tokenizer))
    return " " if first + alone != both == first + spaced else ""


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of ids, added tokens included: the largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hexadecimal) of what decides which ids a text gets: model with vocabulary, normaliser, pre-tokeniser,
    added and special tokens. Saving and loading, truncation, padding and decoding do not change it."""
    parts = _parts(tokenizer)
    content = {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}
    content |= {"vocabulary": _vocabulary(tokenizer), "special": list(_special_ids(tokenizer).values())}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hexadecimal) of what the tokenizer does: its entries with their ids, its special ids, and the ids of
    fixed texts and of its own entries with capitals and accents."""
    vocabulary = _vocabulary(tokenizer)
    content = [vocabulary, list(_special_ids(tokenizer).values()), _behaviour(_parts(tokenizer), vocabulary)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> TokenizerIdentity:
    """What tells `tokenizer` from others, for comparison with the record in a header or checkpoint."""
    return TokenizerIdentity(tokenizer_hash(tokenizer), tokenizer_digest(tokenizer))


def _parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """`pad_id` and so on, in the order of `SPECIAL_NAMES`."""
    return {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_NAMES}


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, int]]:
    """All entries and their ids, by id."""
    return sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])


def _knows_a_word(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether an entry besides added and special tokens has a letter or digit."""
    added = tokenizer.get_added_vocab()
    return any(entry not in added and any(map(str.isalnum, entry)) for entry in tokenizer.get_vocab())


def _drops_unknown_characters(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether characters that the vocabulary lacks vanish from texts: a BPE without unknown token and without bytes."""
    parts = _parts(tokenizer)
    model = parts["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
        return False
    return '"ByteLevel"' not in json.dumps([parts["normalizer"], parts["pre_tokenizer"]])


def _behaviour(parts: dict[str, Any], vocabulary: list[tuple[str, int]]) -> list[list[int]]:
    """The ids that a serialised tokenizer gives to the texts of the probe and to variants of some of its entries.

    The variants show, whatever the vocabulary, whether capitals and accents count. They are made of ASCII: what Python
    knows of other letters depends on its version.
    """
    stems = [stem for entry, _ in vocabulary if (stem := re.sub("[^A-Za-z0-9]", "", entry))]
    chosen = stems[:: max(1, -(-len(stems) // _PROBED_ENTRIES))]
    variants = [f"{stem} {stem.capitalize()} {stem.upper()} {stem[:1]}\u0301{stem[1:]}" for stem in chosen]
    plain = plain_text_tokenizer(json.dumps(parts, ensure_ascii=False))
    encodings = plain.encode_batch([*_PROBE, *variants], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def tokenizer_info(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> TokenizerInfo:
    """The record of `tokenizer` for the header of packed data."""
    return TokenizerInfo(
        path=str(Path(path).resolve()),
        **asdict(tokenizer_identity(tokenizer)),
        **_special_ids(tokenizer),
        vocab_size=vocab_size(tokenizer),
    )


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[Encoding]:
    """Cut texts into tokens as preprocessing does, with nothing around them: every tool reads text through this.

    Called directly, a Hugging Face tokenizer takes "[MASK]" in a text for the special token.
    """
    plain = plain_text_tokenizer(tokenizer.backend_tokenizer.to_str())
    return plain.encode_batch(list(texts), add_special_tokens=False)


def plain_text_tokenizer(serialised: str) -> Tokenizer:
    """The `tokenizers` object for whole texts, from `backend_tokenizer.to_str()`.

    Neither cuts nor pads, and "[SEP]" written in a text is five characters of text, not a document boundary.
    """
    from tokenizers import Tokenizer

    parts = _without_special_tokens(json.loads(serialised))
    tokenizer = Tokenizer.from_str(json.dumps(parts, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_special_tokens(parts: dict[str, Any]) -> dict[str, Any]:
    """A serialised tokenizer whose model cannot use its special tokens for a text.

    `encode_special_tokens` alone keeps the text in front of the model whole, but "[SEP]" is among the model's own
    entries: a unigram model gives it the best score of all, and others find it where text is cut at white space only.
    So special tokens get names that no text contains. (A very bad score would not do for unigram: the model takes it
    for the worst of a piece, and prices unknown characters, such as "[" may be one, still worse.)
    """
    model = parts["model"]
    vocabulary = model["vocab"]
    entries = vocabulary if isinstance(vocabulary, dict) else {entry: i for i, (entry, _) in enumerate(vocabulary)}
    merged = {"".join(merge) for merge in model.get("merges", [])}  # what merges make is a piece like others
    hidden = {
        token["content"]: f"\0{token['content']}"  # U+0000 is taken out of texts as they are read
        for token in parts["added_tokens"]
        if token["special"] and token["content"] in entries and token["content"] not in merged
    }
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(entry, entry): number for entry, number in vocabulary.items()}
    else:
        model["vocab"] = [[hidden.get(entry, entry), score] for entry, score in vocabulary]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in hidden]
    return parts
