"""Training tokenizers: WordPiece as BERT's, unigram and BPE with SentencePiece, all as Hugging Face tokenizers.

Special tokens have ids 0 to 4, in the order of `SPECIAL_TOKENS`. "Uncased" is lower-casing and stripping accents for
WordPiece (BERT's), Unicode case folding for SentencePiece (`nmt_nfkc_cf`), which keeps accents.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.base import MAX_UNIT_CHARACTERS
from megatron_sas.data.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Kind = Literal["wordpiece", "unigram", "bpe"]
KINDS: tuple[Kind, ...] = ("wordpiece", "unigram", "bpe")
_THREADS = 8  # fixed: sums of floats, and so the pieces of a unigram model, depend on how the text is divided
_ALPHABET = 1000  # characters that a WordPiece vocabulary keeps; the rarer ones become [UNK]
_SPACE = "▁"  # what SentencePiece writes for a space, also before the first word


def train_tokenizer(
    paragraphs: Iterable[str], kind: Kind, vocab_size: int, cased: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` entries, special tokens included, from text, which WordPiece reads twice; the same
    text gives the same tokenizer in every process, with any number of cores.

    A WordPiece vocabulary stays smaller than asked for when the text has no more word parts that occur twice.

    Raises:
        InputError: no text, or a vocabulary too small for its characters or larger than SentencePiece can fill.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= len(SPECIAL_TOKENS):
        raise InputError(f"--vocab-size {vocab_size}: must exceed the {len(SPECIAL_TOKENS)} special tokens")
    if next(iter(paragraphs), None) is None:
        raise InputError("--input: no text in it; give at least one paragraph")
    if kind == "wordpiece":
        return _train_wordpiece(paragraphs, vocab_size, cased)
    backend = from_sentencepiece(train_sentencepiece(paragraphs, kind, vocab_size, cased))
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _train_wordpiece(paragraphs: Iterable[str], vocab_size: int, cased: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, later = Counter(), Counter()  # how often each character stands first in a word, and how often later
    for paragraph in paragraphs:
        text = tokenizer.normalizer.normalize_str(paragraph)
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        first.update([word[0] for word in words])
        later.update("".join(word[1:] for word in words))
    alphabet = {character for character, _ in (first + later).most_common(_ALPHABET)}
    # The trainer would number "##a", "##b" … in the random order of a hash map, and breaks ties by number: so they
    # are named beforehand.
    fixed = [*SPECIAL_TOKENS, *sorted(alphabet), *(f"##{c}" for c in sorted(alphabet & later.keys()))]
    if len(fixed) > vocab_size:
        raise InputError(f"--vocab-size {vocab_size}: the characters of the text alone need {len(fixed)}; give more")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        special_tokens=fixed,
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=not cased)


def train_sentencepiece(paragraphs: Iterable[str], kind: Kind, vocab_size: int, cased: bool = False) -> bytes:
    """A serialised SentencePiece model of type unigram or bpe with our special tokens."""
    import sentencepiece

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    model = io.BytesIO()
    faults: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_remembering(paragraphs, faults),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf",
            max_sentence_length=4 * MAX_UNIT_CHARACTERS,  # bytes; longer ones would be left out without a word
            num_threads=_THREADS,
            minloglevel=2,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],
        )
    except RuntimeError as error:
        if faults:
            raise faults[0] from None
        reason = str(error).strip().split("\n")[-1].split("] ")[-1]  # after its source line and condition
        raise InputError(f"--vocab-size {vocab_size}: SentencePiece cannot train on this text ({reason})") from error
    return model.getvalue()


def _remembering(paragraphs: Iterable[str], faults: list[BaseException]) -> Iterator[str]:
    """`paragraphs`, and in `faults` what ended them early: SentencePiece turns it into an error of its own."""
    try:
        yield from paragraphs
    except (Exception, KeyboardInterrupt) as error:
        faults.append(error)
        raise


def from_sentencepiece(serialised: bytes) -> Tokenizer:
    """The `tokenizers` object that cuts texts as a SentencePiece model with our special tokens does.

    Normalisation by the model's own table, spaces as "▁", one before the first word too; `[CLS] … [SEP]` around.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(serialised)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if proto.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        model = models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False)
    else:
        ids = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = _merges(dict(pieces[len(SPECIAL_TOKENS) :]), ids)
        model = models.BPE(ids, merges, unk_token="[UNK]", fuse_unk=True, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="first", split=True)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIAL_TOKENS.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, best first: it stores pieces with scores, any two parts may make one."""
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece])):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in scores and right in scores]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
