"""Requests → token ids with their block hashes, or a clear refusal. Pure; called in batches, large ones off the event loop."""

from collections.abc import Sequence
from time import perf_counter

from services.tokenizer.lay_out import Misfit, Prompt, lay_out
from services.tokenizer.public import PublicPrefixes, part_public
from services.tokenizer.template import BadChat, ChatTemplate
from shared.blocks import root
from shared.fields import pack_ids, unpack_ids
from shared.layout import Layout
from shared.messages import ErrorCode, Fail, Submit, Work
from shared.vocab import Vocab

EVERYBODY = ""  # no tenant has this name


class Refusal(ValueError):
    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Encoder:
    """`public` are texts that tenants may share: see services.tokenizer.public."""

    def __init__(self, vocab: Vocab, context: int, dtype: str, block_size: int, public: Sequence[str] = ()) -> None:
        self._vocab, self._context, self._dtype, self._block_size = vocab, context, dtype, block_size
        self._template = ChatTemplate(vocab)
        self._public = PublicPrefixes(public, self._template, self._packed)

    @property
    def detail(self) -> str:
        return f"{self._vocab.size} tokens, context {self._context}"

    def encode(self, submits: Sequence[Submit], now_ms: int) -> list[Work | Fail]:
        """One answer per request, in order. A bad request is refused alone."""
        started = perf_counter()
        texts: dict[int, str] = {}
        prompts: dict[int, Prompt] = {}
        answers: dict[int, Work | Fail] = {}
        for at, submit in enumerate(submits):
            try:
                text = self._text(submit, now_ms)
                if submit.layout is None:
                    texts[at] = text
                else:
                    prompts[at] = self._laid_out(submit.layout, text, special=isinstance(submit.prompt, str))
            except Refusal as refusal:
                answers[at] = _fail(submit, refusal)
        encoded = self._encode([submits[at] for at in texts], list(texts.values()))
        prompts |= zip(texts, map(Prompt, encoded), strict=True)
        took_ms = 1000 * (perf_counter() - started)
        for at, prompt in prompts.items():
            try:
                answers[at] = self._work(submits[at], prompt, took_ms)
            except Refusal as refusal:
                answers[at] = _fail(submits[at], refusal)
        return [answers[at] for at in range(len(submits))]

    def _text(self, submit: Submit, now_ms: int) -> str:
        if now_ms > submit.deadline_ms:
            raise Refusal("deadline_exceeded", "the request's time ran out before it was tokenized")
        if isinstance(submit.prompt, bytes):
            return ""
        if isinstance(submit.prompt, str):
            return submit.prompt
        try:
            return self._template.render(submit.prompt)
        except BadChat as error:
            raise Refusal("bad_prompt", str(error)) from error

    def _encode(self, submits: Sequence[Submit], texts: Sequence[str]) -> list[list[int]]:
        """A chat's template has written the special tokens already; a plain text gets those that the model's rules add."""
        chats = [text for submit, text in zip(submits, texts, strict=True) if isinstance(submit.prompt, tuple)]
        plain = [text for submit, text in zip(submits, texts, strict=True) if isinstance(submit.prompt, str)]
        queues = {tuple: iter(self._ids(chats, special=False)), str: iter(self._ids(plain, special=True))}
        return [
            list(unpack_ids(submit.prompt)) if isinstance(submit.prompt, bytes) else next(queues[type(submit.prompt)])
            for submit in submits
        ]

    def _laid_out(self, layout: Layout, text: str, special: bool) -> Prompt:
        try:
            return lay_out(layout, text, special, lambda text, special: self._ids([text], special)[0])
        except Misfit as error:
            raise Refusal("bad_prompt", str(error)) from error

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Batches go to the library's own threads, which must wake first: longer than a single text takes."""
        tokenizer = self._vocab.tokenizer
        if len(texts) == 1:
            return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
        return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=special)] if texts else []

    def _work(self, submit: Submit, prompt: Prompt, took_ms: float) -> Work:
        room = self._context - prompt.end
        self._check(submit, prompt, room)
        packed = pack_ids(prompt.ids)
        start = self._root(submit.tenant)
        stops = () if submit.sampling.ignore_eos else self._vocab.stop_ids
        stop_ids = tuple(dict.fromkeys((*submit.sampling.stop_ids, *stops)))
        return Work(
            request=submit.request,
            tenant=submit.tenant,
            partition=submit.partition,
            log_from=submit.log_from,
            generation=submit.generation,
            given=submit.given,
            ends=submit.ends,
            prompt=packed,
            root=start,
            blocks=b"" if prompt.placement else b"".join(self._chain(start, packed)),
            sampling=submit.sampling.model_copy(update={"stop_ids": stop_ids}),
            max_tokens=submit.max_tokens or room,
            deadline_ms=submit.deadline_ms,
            tokenize_ms=took_ms,
            placement=prompt.placement,
            resume=submit.generation > 0,
        )

    def _root(self, tenant: str) -> bytes:
        return root(self._vocab.fingerprint, self._dtype, self._block_size, tenant)

    def _chain(self, start: bytes, packed: bytes) -> list[bytes]:
        public = self._public.blocks(packed, self._block_size)
        return part_public(self._root(EVERYBODY), start, packed, self._block_size, public)

    def _packed(self, text: str, add_special_tokens: bool) -> bytes:
        return pack_ids(self._vocab.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _check(self, submit: Submit, prompt: Prompt, room: int) -> None:
        ids, size = prompt.ids, f"{prompt.end} tokens" + " (with all modules of its schema)" * bool(prompt.placement)
        if not ids:
            raise Refusal("bad_prompt", "the prompt has no tokens")
        if room < 1:
            raise Refusal("prompt_too_long", f"the prompt has {size}; the model's context holds {self._context}")
        if (submit.max_tokens or 1) > room:
            asked = f"a prompt of {size} and max_tokens {submit.max_tokens}"
            raise Refusal("prompt_too_long", f"{asked} do not fit into the model's context of {self._context}")
        if max(ids) >= self._vocab.size or min(ids) < 0:
            raise Refusal("bad_prompt", f"token ids must be from 0 to {self._vocab.size - 1}")
        worst = max((id for id, _ in submit.sampling.logit_bias), default=0)
        if max(worst, *submit.sampling.stop_ids, 0) >= self._vocab.size:
            raise Refusal("bad_prompt", f"logit_bias and stop_token_ids must name ids from 0 to {self._vocab.size - 1}")


def _fail(submit: Submit, refusal: Refusal) -> Fail:
    """Refused before any engine's claim: under the first epoch of the request's generation."""
    return Fail(request=submit.request, epoch=(submit.generation, 0, 0), code=refusal.code, text=str(refusal))
