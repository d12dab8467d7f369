"""Programs in SGLang's frontend language, against a server with a KV policy.

Run each as ``python -m examples.frontend.NAME --server http://127.0.0.1:30000``:

==========  ========================================================================
describe    lists a picture's digits, forks into a question about each, and joins
choose      picks among choices, the likeliest first
converse    several turns about a picture, streamed
batch       one program over many pictures at once
==========  ========================================================================

Nothing in a program says that the cache is compressed: the server does it, and
``state.get_meta_info(name)["kv_policy"]`` reports on every ``sgl.gen``. A program chooses its policy through
its backend (``sglang_vlkv.language``): ``program.run(..., backend=server.asking(kv_policy="h2o"))``.

Of SGLang 0.5.23's ``RuntimeEndpoint``, with any server:

- It sends a JPEG such that the server takes it for a path; ``sglang_vlkv.language.Endpoint`` does not.
- A program takes one picture ("Only support one image"), and ``sgl.video`` does not work: it sends its
  frames in place of an image, which the server refuses.
- ``sgl.select`` works with its default ``choices_method`` only: the two others trip over logprobs that
  the server leaves out.
- Errors are warnings, and a program that goes on after one can hang. ``run(..., use_thread=False)``
  raises them; in a stream, an HTTP 400 is ``KeyError('text')``.
"""
