"""Library: documents kept compressed, found by their content, and asked in any later process.

It shares the folder and the LMDB file of an `EmbeddingStore`, so that a process killed at any moment leaves each
document either complete or absent; see `catalog`. The indices beside it, of vectors and of words, are derived from
these: one that is lost, damaged or out of date is rebuilt or brought up to date.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from extemb_core.answers import Answer, AnswerStream
from extemb_core.documents import Document, refuse_lone_surrogates, several, text_ref
from extemb_core.errors import ConfigError, DocumentError, ExtembError, StoreError
from extemb_core.library import N_PASSAGES, PASSAGE_TOKENS
from extemb_core.library.bm25 import WordIndex, fuse
from extemb_core.library.catalog import Catalogue, Passage, Split, is_of
from extemb_core.library.encoders import SENTENCE_TRANSFORMERS, TextEncoder, as_encoder
from extemb_core.library.passages import split_passages
from extemb_core.library.vector_index import VectorIndex, choose_factory
from extemb_core.loaders import Skipped, read_documents
from extemb_core.models.bulk import compress_in_batches, default_batch_size
from extemb_core.store.format import Dtype, check_dtype, ref_bytes, ref_of
from extemb_core.store.maintenance import LOST, Verified
from extemb_core.store.store import EmbeddingStore
from extemb_core.utils.batches import batches
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import path_of, require_text, whole_number

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

T = TypeVar("T")

logger = logging.getLogger(__name__)

INDEX_FILE = "passages.faiss"
WORDS_FILE = "passages.words"
_BATCH_TOKENS = 4_096  # compressed and written together, or more if a forward pass takes more
_FETCHED = 4  # times k: taken from each ranking before they are fused
_ROUNDS = 5  # of compressing what others drop before the documents are written
_INDEXED = 10_000  # passages whose texts are in memory at once while indexing
_MIN_UNSAVED, _UNSAVED_SHARE = 10_000, 8  # the indices are written after so many changes, or an eighth of all passages


@dataclass(frozen=True, kw_only=True)
class Added:
    """Result of an `add` or a `refresh`.

    Attributes:
        added, updated, unchanged: Numbers of documents.
        n_passages: Number of new passages.
        n_tokens: Tokens of the new passages.
        compressed_tokens: Tokens of the new passages that had to be compressed.
        seconds: Duration.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    n_passages: int = 0
    n_tokens: int = 0
    compressed_tokens: int = 0
    seconds: float = 0.0


class Library:
    """Documents in a folder: add them once, search and ask them in any later process.

    Args:
        path: Folder of the library, which is made if it does not exist.
        lm: Compresses the passages and answers. None to search and maintain a library without a model.
        encoder: Finds passages: the name of a sentence-transformers model, or a function from texts to vectors. A
            library keeps the encoder it was made with; None is that one, or the default in a new library.
        mode: "a" to add, "r" to read.
        passage_tokens: Maximum tokens of a passage, by the LLM's tokenizer; unchanged documents keep their passages.
        ratio: The finest ratio that will be asked for; when not given, the embedder's `kept_ratio`, which plans by
            sentence need.
        dtype: Data type of the embeddings on disk: see `EmbeddingStore.open`.
        index: FAISS name of the index, such as "HNSW32"; by the number of passages when not given.

    Raises:
        StoreError: The folder cannot be opened, or is not a library.
        MismatchError: It was made with another text encoder, or `dtype` does not suit the embedder.
        WeightsNotFoundError, MissingExtraError: The text encoder is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        lm: ExtensibleLM | None = None,
        *,
        encoder: TextEncoder | str | os.PathLike[str] | Callable[[list[str]], Any] | None = None,
        mode: Literal["r", "a"] = "a",
        passage_tokens: int = PASSAGE_TOKENS,
        ratio: int | None = None,
        dtype: Dtype = "float16",
        index: str | None = None,
    ) -> None:
        whole_number(passage_tokens, "passage_tokens", remedy=f"e.g. {PASSAGE_TOKENS}")
        check_dtype(dtype, 0 if lm is None else lm.embedder.config.entry_layer)
        if lm is not None and ratio is not None:
            lm.embedder.config.require_ratio(ratio)
        self._requested_encoder = encoder
        self._encoder: TextEncoder | None = None
        if encoder is not None or (lm is not None and not path_of(path).exists()):
            self._encoder = as_encoder(encoder)  # first: if it is missing, no empty library is left behind
        self.store = EmbeddingStore.open(path, mode, dtype=dtype)
        self.lm = None if lm is None else type(lm)(lm.llm, lm.embedder, self.store, scorer=lm.builder.scorer)
        self.ratio = ratio
        self.passage_tokens = passage_tokens
        self._catalogue = Catalogue(self.store.environment)
        self._factory = index
        self._vectors: VectorIndex | None = None
        self._words: WordIndex | None = None
        self._vectors_synced = self._words_synced = -1  # generations of the indices
        self._unsaved = 0  # passages added or removed since the indices were written
        self._warned = False  # whether stale documents were warned of
        self._embedders: tuple[int, dict[str, int]] | None = None  # of one generation
        if encoder is not None:
            try:
                _ = self.encoder  # refuses a wrong encoder now, not at the first search
            except BaseException:
                self.store.close()
                raise

    @property
    def encoder(self) -> TextEncoder:
        """Text encoder that finds passages.

        Raises:
            MismatchError: The library was made with another text encoder than the one passed.
        """
        if self._encoder is None:
            known = self._read(self._catalogue.settings)["encoder"]
            requested = self._requested_encoder
            if requested is None and known is not None and known.startswith(SENTENCE_TRANSFORMERS):
                requested = known.removeprefix(SENTENCE_TRANSFORMERS)
            self._encoder = as_encoder(requested)
        # Checked each time: another process may have been the first to add to a new library.
        self._read(self._catalogue.check_encoder, self._encoder)
        return self._encoder

    @property
    def path(self) -> Path:
        """Folder of the library."""
        return self.store.path

    def close(self) -> None:
        """Write the indices if something changed, and close the files."""
        try:
            if self._unsaved:
                self._save_indices()
        finally:
            self.store.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._read(self.store.environment.count, "documents")

    @property
    def embedders(self) -> dict[str, int]:
        """Number of documents that each embedder compressed, by its fingerprint."""
        with self.store.environment.read() as transaction:
            generation = self._catalogue.settings(transaction)["generation"]
            if self._embedders is None or self._embedders[0] != generation:  # version 1 stores no counts
                self._embedders = generation, self._catalogue.embedders(transaction)
        return dict(self._embedders[1])

    @property
    def n_stale(self) -> int:
        """Number of documents that were compressed by another embedder than that of `lm`; 0 without an `lm`.

        They are found and read like all others, but compressed again at each question. `refresh` compresses them once
        and for all.
        """
        current = None if self.lm is None else self.lm.embedder.fingerprint
        return sum(count for name, count in self.embedders.items() if current not in (None, name))

    # -- documents --------------------------------------------------------------------------------------------

    def add(self, documents: Any, *, skipped: Skipped | None = None, show_progress: bool | None = None) -> Added:
        """Add documents, or replace those of the same source; unchanged documents cost nothing.

        Documents that were compressed by another embedder, or more coarsely, are brought up to date too. Finished work
        is on disk every few thousand tokens: after Ctrl-C or a crash, the same call goes on.

        Args:
            documents: Files and folders (`pathlib.Path`), texts, `Document`s, or what else `Document.from_any` takes.
                A document is identified by its `source`: the path of its file, relative to the folder that holds the
                library if the file is below it, else absolute; metadata["source"], or its title; else its text. Of
                several documents with one source the last counts, with a warning if their texts differ.
            skipped: See `read_documents`.
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            ConfigError: The library has no `lm`.
            DocumentError: A document cannot be read.
            StoreError: The library is read-only, or the disk refuses.
        """
        listed = list(as_documents(documents, self.path.parent, skipped))
        by_source = {document.source: document for document in listed}
        if other := [one.source for one in listed if one.text != by_source[one.source].text]:
            logger.warning(
                "%d of %d documents are not added: another after them has the same source and another text, such as "
                "%.80r; give each a metadata['source'] of its own, or of one file's pages pass the file's Path",
                len(other), len(listed), other[0],
            )  # fmt: skip
        return self._compress_changed("add", by_source.values(), len(by_source), show_progress)

    def refresh(self, *, show_progress: bool | None = None) -> Added:
        """Compress again, from the texts in the library, the documents that another embedder compressed; see `n_stale`.

        So are those compressed more coarsely than `ratio`, and those whose embeddings are lost or damaged; to find
        these, all embeddings are read. The other embedder's embeddings of these documents are removed. Finished work is
        on disk every few thousand tokens: after Ctrl-C or a crash, the same call goes on.

        Args:
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            ConfigError: The library has no `lm`.
            StoreError: The library is read-only, or the disk refuses.
        """
        self._need_lm()
        self.store.require_writable()
        damaged: dict[str, list[str]] = {}
        for ref, fingerprint, _ in self.store.verify().damaged:
            damaged.setdefault(fingerprint, []).append(ref)
        for fingerprint, refs in damaged.items():  # embeddings of the same texts by other embedders stay
            self.store.remove(refs, None if fingerprint == LOST else fingerprint)
        return self._compress_changed("refresh", self._stored_documents(), len(self), show_progress)

    def remove(self, sources: str | Iterable[str]) -> int:
        """Remove documents by their sources, and embeddings that an interrupted `add` has left of them.

        Returns how many documents were removed; unknown sources are not an error.

        Raises:
            StoreError: The library is read-only, or the disk refuses.
        """
        wanted = [sources] if isinstance(sources, str) else list(sources)

        def work(transaction: Any) -> list[int]:
            forgotten = [self._catalogue.forget(transaction, source) for source in wanted]
            passages = [refs for refs in forgotten if refs is not None]
            expected = [self._catalogue.expected(transaction, source) for source in wanted]
            self._drop_orphans(transaction, set().union(*passages, *expected))
            return [len(refs) for refs in passages]

        removed = self.store.write(work)
        self._changed(sum(removed))
        return len(removed)

    def documents(self) -> Iterator[dict[str, Any]]:
        """Yield the record of every document: source, title, ref, n_chars, n_passages, metadata, fingerprint, ratio."""
        return self._catalogue.records()

    def text(self, source: str) -> str:
        """Return the text of a document.

        Raises:
            DocumentError: There is no document of that source.
            StoreCorruptError: The text is not what was written.
        """
        return self.document(source).text

    def document(self, source: str) -> Document:
        """Return a document as it was added.

        Raises:
            DocumentError: There is no document of that source.
            StoreCorruptError: The document is not what was written.
        """
        with self.store.environment.read() as transaction:
            record, text = self._catalogue.record(transaction, source), self._catalogue.text(transaction, source)
        if record is None or text is None:
            raise DocumentError(f"{self.path} has no document {source!r}; library.documents() lists them")
        return Document(text, title=record["title"], metadata=record["metadata"])

    def verify(self) -> Verified:
        """Read every document with its passages and embeddings, and compare them with their checksums.

        Missing embeddings count as a problem, too.
        """
        found = self.store.verify()
        lost = [
            f"{source}: the embeddings of {len(missing)} passages are lost; compress them anew with: extemb "
            f"index refresh {self.path}"
            for source in [record["source"] for record in self._catalogue.records()]
            if (record := self._read(self._catalogue.record, source)) and (missing := self._missing(record))
        ]
        return replace(found, problems=(*found.problems, *self._catalogue.problems(), *lost))

    def drop_embeddings(self, refs: Iterable[str]) -> None:
        """Drop the embeddings of texts, except of those that are a passage of a document."""
        passages = [(ref_bytes(ref), "") for ref in refs]
        self.store.write(lambda transaction: self._drop_orphans(transaction, passages))

    # -- questions --------------------------------------------------------------------------------------------

    def search(self, question: str, k: int = N_PASSAGES, *, hybrid: bool = True) -> list[Passage]:
        """Find the passages nearest to a question, best first.

        Args:
            question: In the user's words.
            k: Maximum number of passages.
            hybrid: Search by vectors and by words (BM25), fused by reciprocal rank, or by vectors alone.

        Raises:
            ConfigError: The question is empty or not a text, or `k` is not positive.
            DocumentError: The question is not valid Unicode.
            StoreCorruptError: A passage is not what was written.
        """
        require_text(question, "question")
        refuse_lone_surrogates(question, "question")
        whole_number(k, "k", remedy=f"e.g. {N_PASSAGES}")
        if not self._warned and (stale := self.n_stale):
            self._warned = True
            logger.warning(
                "%d of %d documents in %s were compressed by another embedder, and what a question reads of them is "
                "compressed again each time; bring them up to date once with Library.refresh() or: extemb index "
                "refresh %s",
                stale, len(self), self.path, self.path,
            )  # fmt: skip
        with self.store.environment.lock:
            index = self._index()
            if not index.ids:
                return []
            vector = self.encoder.encode([question], query=True)[0]
            near = index.search(vector, _FETCHED * k if hybrid else k)
            if hybrid:
                near = fuse([near, self._word_index().search(question, _FETCHED * k)])[: _FETCHED * k]
            return self._read(self._catalogue.passages, near)[:k]

    def ask(self, question: str, *, k: int = N_PASSAGES, hybrid: bool = True, **settings: Any) -> Answer:
        """Answer from the passages nearest to the question: `search`, then `ExtensibleLM.ask`.

        Each passage becomes a short document: "focus" and "select" rank the sentences of all passages together.

        Args:
            question: In the user's words.
            k: Maximum number of passages; those that do not fit the budget are reported as dropped.
            hybrid: See `search`.
            **settings: Settings of `ExtensibleLM.ask`: budget, ratio, plan, max_new_tokens, ...
        """
        return self.stream(question, k=k, hybrid=hybrid, **settings).finish()

    def stream(self, question: str, *, k: int = N_PASSAGES, hybrid: bool = True, **settings: Any) -> AnswerStream:
        """Stream the answer of `ask`, piece by piece."""
        lm = self._need_lm()
        documents = [passage.to_document() for passage in self.search(question, k, hybrid=hybrid)]
        return lm.stream(question, documents, **settings)

    # -- inside -----------------------------------------------------------------------------------------------

    def _read(self, query: Callable[..., T], *args: Any) -> T:
        """Call `query(transaction, *args)` of the catalogue in a transaction."""
        with self.store.environment.read() as transaction:
            return query(transaction, *args)

    def _stored_documents(self) -> Iterator[Document]:
        """Yield all documents of the library, one by one."""
        for record in self._catalogue.records():
            text = self._read(self._catalogue.text, record["source"])
            if text is not None:  # otherwise it was removed meanwhile
                yield Document(text, title=record["title"], metadata=record["metadata"])

    def _compress_changed(
        self, name: str, documents: Iterable[Document], total: int, show_progress: bool | None
    ) -> Added:
        """Compress and write the documents that are new, changed, or compressed otherwise."""
        start = time.perf_counter()
        lm = self._need_lm()
        self.store.require_writable()
        counts: Counter[str] = Counter()
        fingerprint, finest = lm.embedder.fingerprint, lm.embedder.config.finest(self.ratio)

        def changed() -> Iterator[Split]:
            for document in documents:
                known = self._read(self._catalogue.record, document.source)
                if known and is_of(known, document, fingerprint, finest) and self._is_whole(known, finest):
                    counts["unchanged"] += 1
                    advance(1)
                    continue
                counts["added" if known is None else "updated"] += 1
                spans = split_passages(document.text, self.passage_tokens, lm.llm.lengths)
                yield Split(document, spans, [document.text[begin:end] for begin, end in spans])

        with progress(name, total, show_progress) as advance:
            for batch in batches(changed(), lambda split: sum(lm.llm.lengths(split.texts)), _batch_tokens(lm)):
                self._write(lm, batch, counts)
                advance(len(batch))
        return Added(**counts, seconds=time.perf_counter() - start)

    def _is_whole(self, record: Mapping[str, Any], ratio: int) -> bool:
        """Return whether a document is what was written, and its embeddings are here; these are not read."""
        if self._read(self._catalogue.problem, record["source"]) is not None:
            return False
        return not self._missing(record, ratio)

    def _missing(self, record: Mapping[str, Any], ratio: int | None = None) -> list[str]:
        """List the passages of a document without embeddings at a ratio (when not given, the one it was added at)."""
        refs = self._read(self._catalogue.refs, record)
        return self.store.missing(refs, record["fingerprint"], ratio or record["ratio"])

    def _write(self, lm: ExtensibleLM, batch: Sequence[Split], counts: Counter[str]) -> None:
        """Compress the passages of some documents, then write the documents in one transaction."""
        texts = [text for split in batch for text in split.texts]
        encoder = self.encoder
        vectors = (encoder.encode(texts) if texts else np.zeros((0, encoder.width))).astype("<f2")
        if self._factory is not None:
            VectorIndex(vectors.shape[1], self._factory)  # refuses an unknown FAISS name before anything is written
        finest, fingerprint = lm.embedder.config.finest(self.ratio), lm.embedder.fingerprint
        refs = [text_ref(text) for text in texts]
        wanted = {ref: lm.llm.encode(text) for ref, text in zip(refs, texts, strict=True)}

        def work(transaction: Any) -> list[str]:
            """Write the documents if all their embeddings exist; otherwise list those that are missing."""
            missing = self.store.missing_within(transaction, wanted, fingerprint, finest)
            if missing:
                self._catalogue.expect(transaction, batch, fingerprint)
            else:
                before = self._catalogue.put(transaction, batch, vectors, fingerprint, finest, encoder)
                self._drop_orphans(transaction, before, fingerprint)
            return missing

        rounds = 0
        while missing := self.store.write(work):
            if rounds == _ROUNDS:
                raise StoreError(
                    f"{self.path}: the embeddings of {batch[0].document.source!r} were made {rounds} times, and others "
                    "dropped or replaced them each time; end what writes there and call again"
                )
            self._compress(lm, {ref: wanted[ref] for ref in missing}, counts)
            rounds += 1
        counts["n_passages"] += len(texts)
        counts["n_tokens"] += sum(len(wanted[ref]) for ref in refs)
        self._changed(len(texts))

    def _compress(self, lm: ExtensibleLM, texts: Mapping[str, Any], counts: Counter[str]) -> None:
        """Compress texts, given as token ids by ref, and store them batch by batch: a document may exceed a batch."""
        finest = lm.embedder.config.finest(self.ratio)
        for part in batches(texts.items(), lambda text: len(text[1]), _batch_tokens(lm)):
            for compressed in compress_in_batches(lm.embedder, part, ratio=finest, show_progress=False):
                self.store.put(*compressed)
                counts["compressed_tokens"] += sum(text.n_tokens for text in compressed)

    def _drop_orphans(
        self, transaction: Any, passages: Iterable[tuple[bytes, str]], fingerprint: str | None = None
    ) -> None:
        """Drop embeddings of passages that no document has any more, and other embedders' that no document uses."""
        for ref, other in passages:
            if not self._catalogue.holds(transaction, ref):
                self.store.forget(transaction, ref_of(ref))
            elif fingerprint not in (None, other) and not self._catalogue.holds(transaction, ref, other):
                self.store.forget(transaction, ref_of(ref), other)

    def _index(self) -> VectorIndex:
        """Return the FAISS index, brought up to date with what was added and removed since."""
        with self.store.environment.read() as transaction:
            settings = self._catalogue.settings(transaction)
            if self._vectors is not None and settings["generation"] == self._vectors_synced:
                return self._vectors
            mark = self._catalogue.index_mark(transaction)
        width = settings["width"]
        if settings["encoder"] is None:  # the width is known when the first are added
            return VectorIndex(width)
        index, self._vectors = self._vectors, None  # after Ctrl-C a half-updated index is not used again
        index = index or VectorIndex.load(
            self.path / INDEX_FILE, width, self._factory, encoder=settings["encoder"], mark=mark
        )
        if index is not None and index.width == width:
            try:
                self._add_vectors(index)
            except ConfigError:  # an index of this kind takes no more vectors
                index = None
        if index is None or index.width != width or index.should_be_made_anew():
            count = self._read(self.store.environment.count, "passages")
            index = VectorIndex(width, self._factory or choose_factory(count), self._factory)
            self._add_vectors(index)
        self._vectors, self._vectors_synced = index, settings["generation"]
        return index

    def _add_vectors(self, index: VectorIndex) -> None:
        """Bring an index up to date."""
        gone, new = self._read(self._catalogue.changes, index.ids)
        index.remove(gone)
        index.add(*self._read(self._catalogue.vectors, sorted(new)))

    def _word_index(self) -> WordIndex:
        """Return the index of words, brought up to date with what was added and removed since."""
        generation = self._read(self._catalogue.settings)["generation"]
        if self._words is None or self._words_synced != generation:
            index, self._words = self._words, None
            mark = self._read(self._catalogue.index_mark)
            index = index or WordIndex.load(self.path / WORDS_FILE, mark) or WordIndex()
            self._add_words(index)
            if index.should_be_made_anew():
                index = WordIndex()
                self._add_words(index)
            self._words, self._words_synced = index, generation
        return self._words

    def _add_words(self, index: WordIndex) -> None:
        """Bring an index up to date."""
        gone, new = self._read(self._catalogue.changes, index.ids)
        index.remove(gone)
        for numbers in batches(sorted(new), lambda _: 1, _INDEXED):
            passages = self._read(self._catalogue.passages, [(number, 0.0) for number in numbers])
            index.add([passage.id for passage in passages], [passage.text for passage in passages])

    def _changed(self, n_passages: int) -> None:
        """Note that passages were added or removed; write the indices only now and then, as each is written whole."""
        self._unsaved += n_passages
        n_there = self._read(self.store.environment.count, "passages")
        if self._unsaved > max(_MIN_UNSAVED, n_there // _UNSAVED_SHARE):
            self._save_indices()

    def _save_indices(self) -> None:
        """Write the indices; if that fails, they are made anew from the store later."""
        with self.store.environment.lock:
            self._unsaved = 0
            try:
                encoder, mark = self._read(self._catalogue.settings)["encoder"], secrets.token_hex(8)
                vectors, words = self._index(), self._word_index()
                vectors.save(self.path / INDEX_FILE, encoder=encoder, mark=mark)
                words.save(self.path / WORDS_FILE, mark)
                self.store.write(lambda transaction: self._catalogue.set_index_mark(transaction, mark))
            except ExtembError as error:
                logger.warning("the documents are kept, and their index was not written: %s", error)

    def _need_lm(self) -> ExtensibleLM:
        if self.lm is None:
            raise ConfigError("this library was opened without an LLM; pass lm=ExtensibleLM.from_pretrained(...)")
        return self.lm


def _batch_tokens(lm: ExtensibleLM) -> int:
    chunk_size = lm.embedder.config.chunk_size
    return max(_BATCH_TOKENS, default_batch_size(lm.llm, chunk_size) * chunk_size)


def as_documents(documents: Any, near: Path, skipped: Skipped | None) -> Iterator[Document]:
    """Read paths, with sources as `_located` makes them, and take everything else as documents."""
    for item in [documents] if isinstance(documents, os.PathLike) else several(documents):
        if isinstance(item, os.PathLike):
            yield from (_located(document, near) for document in read_documents(item, skipped=skipped))
        else:
            yield Document.from_any(item)


def _located(document: Document, near: Path) -> Document:
    """Set the source of a file's document to its path, however that was typed: relative to `near` if it is below."""
    typed = Path(document.source)
    file = typed.parent.resolve() / typed.name  # a linked file keeps its name, and so its suffix
    source = file.relative_to(near) if file.is_relative_to(near) else file
    return replace(document, metadata={**document.metadata, "source": str(source)})
