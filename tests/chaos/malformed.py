"""Requests that no server can serve, or that look so: each must be an HTTP 4xx and disturb nobody."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import json
import math
import struct
import zlib
from functools import cache
from typing import Iterator

from PIL import Image

from sglang_vlkv.policies import policies
from sglang_vlkv.stages.policy import Policy
from tests.chaos.plan import Malformed, Raw
from tests.prompts import CLIP, draw_prompt
from tests.serving import Server, data_url, user_turn

JSON = {"Content-Type": "application/json"}
CLOSED = "http://127.0.0.1:9"  # nobody listens on discard
HUGE = 10**400  # no float holds it

# What ends the scheduler of SGLang 0.5.23 itself, seen with ``SGLANG_PLUGINS=vlkv_cpu``: never sent to a
# server that others need.
BRING_DOWN_STOCK = {
    "field/text no text", "field/text list with nothing", "field/input_ids negative",
    "field/input_ids beyond the vocabulary", "field/input_ids 2**31", "field/input_ids a list with nothing",
    "field/logprob_start_len 0", "field/top_logprobs_num 1", "field/top_logprobs_num 3", "chat/top_logprobs",
    "completions/prompt ids", "completions/logprobs",
    "sampling/logit_bias 6",  # beside a sampled request: infinite logits have no distribution
}  # fmt: skip
# What is never answered; SGLang's next pause of mode "abort" then waits for ever, and all with it.
HANG_STOCK = {"media/300 placeholders", "media/a placeholder in the text"}
SPARED = BRING_DOWN_STOCK | HANG_STOCK


def encoded(body: object) -> bytes:
    """JSON with NaN, Infinity and lone surrogates as Python writes them."""
    return json.dumps(body).encode()


def as_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---- Files ----


def png(width: int, height: int, rows: bytes = b"", bits: int = 1) -> bytes:
    """A greyscale PNG that says what it is told to, right or wrong."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def file_of(kind: str, size: tuple[int, int] = (196, 196), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def files() -> dict[str, str]:
    """Broken pictures by name, as data URLs."""
    whole, jpeg = file_of("PNG"), file_of("JPEG")
    side = 30_000
    return {
        "bad base64": "data:image/png;base64,@@@@",
        "no base64": "data:image/png;base64,",
        "no comma": "data:image/png;base64",
        "empty string": "",
        "text for a picture": as_url(b"this is no picture"),
        "truncated png": as_url(whole[: len(whole) // 2]),
        "png header only": as_url(whole[:33]),
        "truncated jpeg": as_url(jpeg[: len(jpeg) // 8], "image/jpeg"),
        "flipped bytes": as_url(whole[:200] + bytes(b ^ 255 for b in whole[200:]), "image/png"),
        "zero width": as_url(png(0, 10)),
        "zero height": as_url(png(10, 0)),
        "1 x 10000 pixels": as_url(png(1, 10_000, b"\0\0" * 10_000)),
        "decompression bomb": as_url(png(side, side, bytes(side // 8 + 1) * side)),
        "2 ** 31 - 1 pixels wide": as_url(png(2**31 - 1, 2**31 - 1)),
        "video for a picture": as_url(CLIP.read_bytes(), "video/mp4"),
        "svg": as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        "closed port": f"{CLOSED}/a.png",
        "no such file": "file:///nonexistent/a.png",
        "no such path": "/nonexistent/a.png",
        "unknown scheme": "gopher://127.0.0.1/a.png",
        "lone surrogate": "\ud800",
        "NUL": "\0",
    }


@cache
def strange_files() -> dict[str, str]:
    """Pictures that some viewer shows."""
    frames = [Image.effect_noise((196, 196), 90) for _ in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    return {
        "1 x 1 pixel": as_url(png(1, 1, b"\0\0")),
        "16 bits": as_url(file_of("PNG", mode="I;16")),
        "palette": as_url(file_of("PNG", mode="P")),
        "alpha": as_url(file_of("PNG", mode="RGBA")),
        "CMYK jpeg": as_url(file_of("JPEG", mode="CMYK"), "image/jpeg"),
        "bmp called png": as_url(file_of("BMP")),
        "animated gif": as_url(animated.getvalue(), "image/gif"),
        "4 million pixels": as_url(png(2000, 2000, bytes(251) * 2000)),
        "base64 with blanks": data_url(Image.new("RGB", (196, 196))).replace("A", "A\n "),
    }


def media() -> Iterator[Malformed]:
    turn = user_turn("what", 1, False)
    few = {"max_new_tokens": 2, "temperature": 0}
    good = data_url(Image.effect_noise((196, 196), 90).convert("RGB"))

    def asked(name: str, **fields) -> Malformed:
        return Malformed(f"media/{name}", encoded({"text": turn, "sampling_params": few} | fields))

    for name, url in files().items():
        yield asked(name, image_data=[url])
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
        body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
        yield Malformed(f"chat media/{name}", encoded(body), "/v1/chat/completions")
        source = {"type": "base64", "media_type": "image/png", "data": url.rpartition(",")[2]}
        content = [{"type": "image", "source": source}, {"type": "text", "text": "what"}]
        body["messages"] = [{"role": "user", "content": content}]
        yield Malformed(f"messages media/{name}", encoded(body), "/v1/messages")
    for name, url in strange_files().items():
        yield asked(name, image_data=[url])._replace(odd=True)
    types = {"a number": 7, "null": [None], "an object": {}, "a list of numbers": [1, 2], "true": True}
    for name, value in types.items():
        yield asked(f"image_data {name}", image_data=value)._replace(odd=True)
    yield asked("nested 9 deep", image_data=[[[[[[[[[good]]]]]]]]])
    yield asked("placeholder without a picture")._replace(odd=True)
    yield asked("picture without a placeholder", text="what", image_data=[good])._replace(odd=True)
    yield asked("two pictures, one placeholder", image_data=[good, good])._replace(odd=True)
    two = user_turn("what", 2, False)
    yield asked("one picture, two placeholders", text=two, image_data=[good])._replace(odd=True)
    literal = user_turn("what is <|image_pad|>?", 1, False)
    yield asked("a placeholder in the text", text=literal, image_data=[good])._replace(odd=True)
    yield asked("300 placeholders", text=turn + "<|image_pad|>" * 300, image_data=[good])._replace(odd=True)
    yield asked("1500 vision_start", text="<|vision_start|>" * 1500, image_data=[good])._replace(odd=True)
    film = user_turn("what", 0, True)
    clip = CLIP.read_bytes()
    videos = {
        "truncated mp4": as_url(clip[: len(clip) // 2], "video/mp4"),
        "mp4 header only": as_url(clip[:64], "video/mp4"),
        "picture for a video": good,
        "text for a video": as_url(b"no film", "video/mp4"),
        "empty video": "data:video/mp4;base64,",
        "video at a closed port": f"{CLOSED}/a.mp4",
        "no such video": "/nonexistent/a.mp4",
    }
    for name, url in videos.items():
        yield asked(name, text=film, video_data=url)._replace(odd=name == "truncated mp4")
    for kind in ("audio_data", "video_data"):
        yield asked(f"{kind} of no such kind", **{kind: 7})._replace(odd=True)


# ---- Fields ----

WRONG = {
    "null": None, "a string": "ten", "a list": [1], "an object": {"a": 1}, "NaN": math.nan,
    "Infinity": math.inf, "-Infinity": -math.inf, "1e308": 1e308, "-1": -1, "-0.0": -0.0,
    "true": True, "2**63": 2**63, "10**400": HUGE, "2**31": 2**31,
}  # fmt: skip
NUMBERS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "n",
)  # fmt: skip
# Enough samples, or tokens, to keep any machine busy.
TOO_MANY = {("max_new_tokens", "null"), *(("n", name) for name in ("2**31", "2**63", "10**400", "1e308"))}


def sampling() -> Iterator[Malformed]:
    def asked(name: str, params: object, odd: bool = True, **fields) -> Malformed:
        body = {"text": user_turn("what", 0, False), "sampling_params": params} | fields
        return Malformed(f"sampling/{name}", encoded(body), odd=odd)

    few = {"max_new_tokens": 2, "temperature": 0}
    for field in NUMBERS:
        for name, value in WRONG.items():
            if (field, name) not in TOO_MANY:
                yield asked(f"{field} {name}", few | {field: value})
    others = {
        "stop": [3, [1], [""], {"a": 1}, ["\ud800"], "x" * 100_000],
        "stop_regex": ["(", 3, ["["], "(?P<"],
        "stop_token_ids": ["a", [-1], [2**63], [1.5], 3],
        "json_schema": ["{", 3, '{"type": "nothing"}', "[]"],
        "regex": ["[", "(", 3, "\ud800"],
        "ebnf": ["x", "root ::=", 3],
        "structural_tag": ["{", "3"],
        "logit_bias": [{"999999": 1}, {"-1": 1}, {"a": 1}, {"0": "x"}, {"0": math.nan}, [1], {"0": 1e308}],
        "skip_special_tokens": ["x", 3, None],
        "ignore_eos": ["x", None],
        "no_such_field": [1],
        "sampling_seed": ["x", -1, 2**63, HUGE],
    }  # fmt: skip
    for field, values in others.items():
        for index, value in enumerate(values):
            yield asked(f"{field} {index}", few | {field: value})
    for name, params in {"a string": "x", "a number": 3, "a list": [], "list of lists": [[]]}.items():
        yield asked(f"sampling_params {name}", params)
    yield asked("min_new_tokens above max_new_tokens", few | {"min_new_tokens": 9}, odd=False)
    yield asked("max_new_tokens beyond the context", few | {"max_new_tokens": 10**7})


def fields() -> Iterator[Malformed]:
    few = {"max_new_tokens": 2, "temperature": 0}

    def asked(name: str, odd: bool = True, **fields) -> Malformed:
        return Malformed(f"field/{name}", encoded({"sampling_params": few} | fields), odd=odd)

    yield asked("no prompt", odd=False)
    yield asked("two prompts", text="what", input_ids=[1])
    texts = {
        "null": None, "a number": 3, "an object": {}, "no text": "", "an empty list": [],
        "list of numbers": [3], "lone surrogate": "a\ud800b", "NUL": "a\0b", "emoji": "\U0001f600" * 40,
        "right to left": "\u05d0\u202e\u05d1", "combining": "e" + "\u0301" * 500, "list with nothing": [""],
    }  # fmt: skip
    for name, text in texts.items():
        yield asked(f"text {name}", text=text)
    yield asked("prompt longer than the context", odd=False, text="x" * 70_000)
    ids = {
        "empty": [], "negative": [-1], "beyond the vocabulary": [10**6], "2**31": [2**31],
        "2**63": [2**63], "10**400": [HUGE], "strings": ["a"], "floats": [1.5], "NaN": [math.nan],
        "nested twice": [[[1]]], "an object": {}, "a list with nothing": [[]], "null inside": [None],
        "true inside": [True],
    }  # fmt: skip
    for name, value in ids.items():
        yield asked(f"input_ids {name}", input_ids=value)
    embeds = {"wrong width": [[0.0] * 7], "NaN": [[math.nan] * 64], "ragged": [[0.0], [0.0, 1.0]]}
    for name, value in {**embeds, "a string": "x"}.items():
        yield asked(f"input_embeds {name}", input_embeds=value)
    others = {
        "rid": [3, [], {}, "", "\ud800", "x" * 10_000],
        "stream": ["x", 3],
        "return_logprob": ["x", 3, [True, False]],
        "logprob_start_len": [-5, 10**9, "x", 2**63],
        "top_logprobs_num": [-1, 10**6, "x", 2**63],
        "token_ids_logprob": [[10**9], [-1], "x", [2**63]],
        "lora_path": ["x", 3],
        "priority": ["x", 2**63],
        "extra_key": [3, "\ud800", []],
        "cache_salt": [3, [], ""],
        "session_params": [{"id": "x"}, 3],
        "return_hidden_states": ["x"],
        "modalities": [3, ["smell"]],
        "routed_dp_rank": [99, -1, "x"],
        "no_such_field": [1],
    }  # fmt: skip
    for field, values in others.items():
        for index, value in enumerate(values):
            body = {"return_logprob": True} if "logprob" in field and field != "return_logprob" else {}
            yield asked(f"{field} {index}", text="what", **{**body, field: value})


def endpoints() -> Iterator[Malformed]:
    """What the OpenAI and Anthropic endpoints, and those of the operator, are sent."""

    def says(content: object) -> dict:
        return {"messages": [{"role": "user", "content": content}]}

    hello = says("what")["messages"]
    chats = {
        "no messages": {"messages": []},
        "null": {"messages": None},
        "a string": {"messages": "what"},
        "an empty message": {"messages": [{}]},
        "unknown role": {"messages": [{"role": "wizard", "content": "a"}]},
        "content a number": says(3),
        "unknown part": says([{"type": "smell"}]),
        "picture without a url": says([{"type": "image_url"}]),
        "url a number": says([{"type": "image_url", "image_url": {"url": 3}}]),
        "lone surrogate": says("\ud800"),
        "negative max_tokens": {"max_tokens": -1},
        "huge max_tokens": {"max_tokens": 10**9},
        "max_tokens a string": {"max_tokens": "x"},
        "n 0": {"n": 0},
        "temperature NaN": {"temperature": math.nan},
        "tools junk": {"tools": [{"type": "function"}]},
        "tools a number": {"tools": 3},
        "response_format junk": {"response_format": {"type": "json_schema"}},
        "stream_options without stream": {"stream_options": {"include_usage": "x"}},
        "top_logprobs": {"logprobs": True, "top_logprobs": 10**6},
        "chat_template_kwargs": {"chat_template_kwargs": 3},
        "custom_params a list": {"custom_params": [1]},
    }
    for name, body in chats.items():
        body = {"model": "m", "max_tokens": 2, "messages": hello} | body
        yield Malformed(f"chat/{name}", encoded(body), "/v1/chat/completions", odd=True)
        yield Malformed(f"messages/{name}", encoded(body), "/v1/messages", odd=True)
    prompts = {
        "null": None,
        "nothing": "",
        "no list": [],
        "an object": {},
        "nothing in it": [[]],
        "ids": [-1],
    }
    for name, prompt in prompts.items():
        body = encoded({"model": "m", "max_tokens": 2, "prompt": prompt})
        yield Malformed(f"completions/prompt {name}", body, "/v1/completions", odd=True)
    extras = {"echo": "x", "best_of": -1, "logprobs": 10**6, "suffix": 3}
    for name, extra in extras.items():
        body = encoded({"model": "m", "max_tokens": 2, "prompt": "what", name: extra})
        yield Malformed(f"completions/{name}", body, "/v1/completions", odd=True)
    yield Malformed("messages/no max_tokens", encoded({"model": "m", "messages": hello}), "/v1/messages")
    no_model = encoded({"model": "", "max_tokens": 2, "messages": hello})
    yield Malformed("messages/no model", no_model, "/v1/messages")
    yield Malformed("operator/unknown pause mode", encoded({"mode": "x"}), "/pause_generation")
    yield Malformed("operator/rid a number", encoded({"rid": 3}), "/abort_request", odd=True)
    for name in ("..", "%00", "%ff", "x" * 5000, "%F0%9F%98%80"):
        path = f"/kv_policy/requests/{name}"
        yield Malformed(f"operator/report {name[:20]}", b"", path, method="GET", headers={})


def http() -> Iterator[Malformed]:
    """Bodies that are no JSON objects, and headers that say something else."""
    good = encoded({"text": "what", "sampling_params": {"max_new_tokens": 2}})
    bodies = {
        "nothing": b"",
        "half an object": good[:-5],
        "null": b"null",
        "a list": b"[]",
        "a string": b'"x"',
        "a number": b"3",
        "invalid UTF-8": good.replace(b"what", b"\xff\xfe\x80"),
        "UTF-16": good.decode().encode("utf-16"),
        "trailing comma": good[:-1] + b",}",
        "two objects": good + good,
        "single quotes": good.replace(b'"', b"'"),
        "open brackets": b"[" * 100_000,
        "nested lists": b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "garbage": bytes(range(256)) * 40,
        "control characters": good.replace(b"what", b"\x01\x02\n"),
    }
    for path in ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages"):
        for name, body in bodies.items():
            odd = (path, name) == ("/generate", "UTF-16")  # JSON allows it
            yield Malformed(f"http/{name} to {path}", body, path, odd=odd)
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "a/b", ""):
        yield Malformed(f"http/content type {kind!r}", good, headers={"Content-Type": kind}, odd=True)
    packed = {**JSON, "Content-Encoding": "gzip"}
    yield Malformed("http/gzip", gzip.compress(good), headers=packed)
    yield Malformed("http/no such method", b"", method="DELETE")
    yield Malformed("http/GET", b"", method="GET")
    yield Malformed("http/no such path", good, "/generate/../nothing")


# ---- custom_params: ours ----


def custom_params() -> Iterator[Malformed]:
    picture = draw_prompt(0, "image")

    def asked(name: str, custom: object, odd: bool = False) -> Malformed:
        body = Server.body(picture.text, picture.images, max_new_tokens=2)
        body["sampling_params"]["custom_params"] = custom
        return Malformed(f"custom/{name}", encoded(body), odd=odd, ours=True)

    for name, value in WRONG.items():
        yield asked(f"kv_budget {name}", {"kv_policy": "vlcache", "kv_budget": value}, odd=name == "null")
        yield asked(f"kv_policy {name}", {"kv_policy": value})
        config = {"kv_policy": "vlcache", "kv_policy_config": value}
        yield asked(f"kv_policy_config {name}", config, odd=name == "null")
        yield asked(f"kv_report {name}", {"kv_report": value})
    deep: dict = {}
    for _ in range(300):
        deep = {"a": deep}
    for name, value in {"an empty list": [], "no text": "", "false": False, "0": 0}.items():
        yield asked(name, value)
    yield asked("a list", [1])
    yield asked("a string", "x")
    yield asked("a number", 3)
    yield asked("unknown key", {"kv_budgets": 0.1})
    yield asked("lone surrogate key", {"kv_\ud800": 1})
    yield asked("lone surrogate policy", {"kv_policy": "\ud800"})
    yield asked("lone surrogate option", {"kv_policy": "vlkv", "kv_policy_config": {"\ud800": 1}})
    yield asked("NUL policy", {"kv_policy": "vl\0kv"})
    yield asked("deep option", {"kv_policy": "vlkv", "kv_policy_config": deep})
    yield asked("deep value", {"kv_policy": "vlkv", "kv_policy_config": {"modality_floors": deep}})
    yield asked("deep stranger", {"other": deep}, odd=True)
    yield asked("4 MB option", {"kv_policy": "vlkv", "kv_policy_config": {"x" * (4 << 20): 1}})
    yield asked("4 MB policy", {"kv_policy": "x" * (4 << 20)})
    yield asked("4 MB stranger", {"other": "x" * (4 << 20)}, odd=True)
    yield asked("100,000 strangers", {str(i): i for i in range(100_000)}, odd=True)
    given = {"kv_policy": "given", "kv_policy_config": {"visual": [2**30] * 100_000}}
    yield asked("100,000 given tokens", given, odd=True)
    yield asked("private key", {"_vlkv_reads_draft": "x"})


def options() -> Iterator[Malformed]:
    """Every option of every policy with every wrong value, and with some that are only extreme."""
    body = draw_prompt(3, "image").body(2)
    extreme = {"0": 0, "1": 1, "2": 2, "2**31 - 1": 2**31 - 1, "1e-300": 1e-300, "nothing": "", "no list": []}
    common = {option.name for option in dataclasses.fields(Policy)}
    for policy in policies().values():
        own = [option.name for option in dataclasses.fields(policy)]
        for option in own if policy.name == "vlkv" else [name for name in own if name not in common]:
            for name, value in (WRONG | extreme).items():
                config = {"kv_policy": policy.name, "kv_policy_config": {option: value}}
                asked = body | {"sampling_params": body["sampling_params"] | {"custom_params": config}}
                case = f"option/{policy.name} {option} {name}"
                yield Malformed(case, encoded(asked), odd=True, ours=True)


def raw() -> Iterator[Raw]:
    good = encoded({"text": "what", "sampling_params": {"max_new_tokens": 2}})
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    yield Raw("garbage", bytes(range(256)) * 8)
    yield Raw("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200))
    yield Raw("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    yield Raw("negative length", head + b"Content-Length: -5\r\n\r\n" + good)
    yield Raw("length a word", head + b"Content-Length: ten\r\n\r\n" + good)
    yield Raw("two lengths", head + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n" + good)
    yield Raw("bad chunk size", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + good)
    yield Raw("huge header", head + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n")
    yield Raw("5000 headers", head + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n")
    yield Raw("truncated body", head + b"Content-Length: 9999\r\n\r\n" + good, closes=True)
    yield Raw("half a header", head[:40], closes=True)
    yield Raw("nothing", b"", closes=True)


def all_cases() -> list[Malformed]:
    """Every malformed request but those of :func:`raw`."""
    groups = media, sampling, fields, endpoints, http, custom_params
    return [case for group in groups for case in group()]
