"""The two shapes of OpenAI's answers, chat and completion: pure functions from a session to JSON."""

from collections.abc import Mapping
from typing import Any, Protocol

from services.streamer.schema import Generation
from services.streamer.session import Delta, Session
from shared.messages import Logprob

Json = dict[str, Any]


class Shape(Protocol):
    def opening(self, head: Json, session: Session) -> list[Json]: ...
    def chunk(self, head: Json, session: Session, body: Generation, delta: Delta) -> Json: ...
    def whole(self, head: Json, session: Session, body: Generation, texts: list[str]) -> Json: ...


def _ids(session: Session, choice: int, first: int, count: int) -> list[int]:
    return list(session.follower.choices[choice].ids[first:count])


def _logprobs(session: Session, choice: int, first: int, count: int) -> list[tuple[int, Logprob]]:
    told = session.follower.choices[choice]
    pairs = zip(told.ids[first:count], told.logprobs[first:count], strict=True)
    return [(id, logprob) for id, logprob in pairs if logprob is not None]


def _piece(session: Session, id: int) -> str:
    return str(session.vocab.tokenizer.decode([id], skip_special_tokens=False))


def _extras(session: Session, body: Generation, choice: int, first: int, count: int) -> Json:
    return {"token_ids": _ids(session, choice, first, count)} if body.return_token_ids else {}


class _Chat:
    def opening(self, head: Json, session: Session) -> list[Json]:
        """Chat streams open with the role, before any text."""
        delta = {"role": "assistant", "content": ""}
        choices = [_choice(at, {"delta": delta, "logprobs": None}, None) for at in range(len(session.outputs))]
        return [head | {"object": "chat.completion.chunk", "choices": [choice]} for choice in choices]

    def chunk(self, head: Json, session: Session, body: Generation, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text or not delta.finish else {}
        part = {"delta": content, "logprobs": self._logprobs(session, body, delta.choice, delta.first, delta.count)}
        part |= _extras(session, body, delta.choice, delta.first, delta.count)
        return head | {"object": "chat.completion.chunk", "choices": [_choice(delta.choice, part, delta.finish)]}

    def whole(self, head: Json, session: Session, body: Generation, texts: list[str]) -> Json:
        choices = []
        for at, (text, output) in enumerate(zip(texts, session.outputs, strict=True)):
            part = {"message": {"role": "assistant", "content": text, "refusal": None}}
            part["logprobs"] = self._logprobs(session, body, at, 0, output.count)  # type: ignore[assignment]
            choices.append(_choice(at, part | _extras(session, body, at, 0, output.count), output.finish))
        return head | {"object": "chat.completion", "choices": choices, "usage": session.usage()}

    def _logprobs(self, session: Session, body: Generation, choice: int, first: int, count: int) -> Json | None:
        if body.logprobs_wanted() is None:
            return None
        content = []
        for id, (logprob, top) in _logprobs(session, choice, first, count):
            alternatives = [_token(_piece(session, other), value) for other, value in top]
            content.append(_token(_piece(session, id), logprob) | {"top_logprobs": alternatives})
        return {"content": content, "refusal": None}


class _Completion:
    def opening(self, head: Json, session: Session) -> list[Json]:
        return []

    def chunk(self, head: Json, session: Session, body: Generation, delta: Delta) -> Json:
        part = {"text": delta.text, "logprobs": self._logprobs(session, body, delta.choice, delta.first, delta.count)}
        part |= _extras(session, body, delta.choice, delta.first, delta.count)
        return head | {"object": "text_completion", "choices": [_choice(delta.choice, part, delta.finish)]}

    def whole(self, head: Json, session: Session, body: Generation, texts: list[str]) -> Json:
        choices = []
        for at, (text, output) in enumerate(zip(texts, session.outputs, strict=True)):
            part = {"text": text, "logprobs": self._logprobs(session, body, at, 0, output.count)}
            choices.append(_choice(at, part | _extras(session, body, at, 0, output.count), output.finish))
        return head | {"object": "text_completion", "choices": choices, "usage": session.usage()}

    def _logprobs(self, session: Session, body: Generation, choice: int, first: int, count: int) -> Json | None:
        if body.logprobs_wanted() is None:
            return None
        told = _logprobs(session, choice, first, count)
        tops = [{_piece(session, other): value for other, value in top} for _, (_, top) in told]
        tokens = [_piece(session, id) for id, _ in told]
        return {"tokens": tokens, "token_logprobs": [logprob for _, (logprob, _) in told], "top_logprobs": tops}


def _choice(index: int, part: Mapping[str, Any], finish: str | None) -> Json:
    return {"index": index, **part, "finish_reason": finish}


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


CHAT: Shape = _Chat()
COMPLETION: Shape = _Completion()
