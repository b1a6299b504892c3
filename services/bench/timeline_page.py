"""The frame around a timeline: one file that needs nothing else. Zoom is plain CSS, so there is no script."""

from collections.abc import Sequence
from html import escape

KINDS = {
    "waiting": "waiting for the first token",
    "streaming": "streaming",
    "encode": "tokenize",
    "plan": "plan",
    "commit": "commit",
    "publish": "publish",
    "prefill": "device: prefill tokens",
    "decode": "device: decode rows",
    "detokenize": "detokenize",
    "write": "write to the client",
}

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf7;--fg:#22252b;--dim:#737985;--line:#e4e1d9;
--waiting:#e9c46a;--streaming:#8fc9bd;--encode:#b5658f;--plan:#8a94a6;--commit:#5b6b8c;--publish:#a9b8d0;
--prefill:#e76f51;--decode:#2a7f8e;--detokenize:#7a5ea8;--write:#c3a6e0}
@media(prefers-color-scheme:dark){:root{--bg:#15181d;--fg:#e8e6e1;--dim:#8c93a0;--line:#2b3038;
--waiting:#c79a3b;--streaming:#3f8f82;--plan:#97a3b8;--commit:#6f83ad;--publish:#52627c;--decode:#3fa7b8}}
body{margin:0;padding:28px 32px;background:var(--bg);color:var(--fg);font:14px/1.5 system-ui,sans-serif}
h1{font-size:22px;font-weight:600;margin:0}p{color:var(--dim);margin:2px 0 14px}
.key span{margin-right:16px;white-space:nowrap}
.key u{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.zoom{color:var(--dim);margin-right:10px}
.frame{display:flex;margin-top:14px}.names{position:relative;width:120px;flex:none}
.names b{position:absolute;font-weight:500;font-size:12px;color:var(--dim)}
.scroll{overflow-x:auto;flex:1}.wide{position:relative;width:100%}
#z4:checked~.frame .wide{width:400%}#z16:checked~.frame .wide{width:1600%}#z64:checked~.frame .wide{width:6400%}
svg{display:block;width:100%}.ticks{position:relative;height:22px;border-top:1px solid var(--line)}
.ticks i{position:absolute;font-style:normal;font-size:11px;color:var(--dim);border-left:1px solid var(--line);padding-left:4px}
"""


def page(
    headline: str, subtitle: str, labels: Sequence[str], boxes: Sequence[str], ticks: Sequence[str], size: tuple[int, int]
) -> str:
    """`size` is the picture's width in microseconds and its height in pixels; labels, boxes and ticks are markup."""
    width, height = size
    colours = "".join(f".{name}{{fill:var(--{name})}}u.{name}{{background:var(--{name})}}" for name in KINDS)
    key = "".join(f'<span><u class="{name}"></u>{escape(told)}</span>' for name, told in KINDS.items())
    zooms = "".join(
        f'<input type="radio" name="z" id="z{n}"{" checked" * (n == 1)}><label class="zoom" for="z{n}">{n}×</label>'
        for n in (1, 4, 16, 64)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Headrace: timeline</title><style>{STYLE}{colours}</style>'
        f'<h1>{escape(headline)}</h1><p>{escape(subtitle)}</p><div class="key">{key}</div>{zooms}'
        f'<div class="frame"><div class="names" style="height:{height}px">{"".join(labels)}</div>'
        f'<div class="scroll"><div class="wide"><svg viewBox="0 0 {width} {height}" height="{height}" '
        f'preserveAspectRatio="none">{"".join(boxes)}</svg><div class="ticks">{"".join(ticks)}</div></div></div></div></html>\n'
    )
