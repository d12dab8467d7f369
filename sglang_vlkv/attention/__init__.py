"""One ragged counterpart for each SGLang attention backend that can serve a policy."""

# SGLang attention backend -> what serves it while a policy is armed.
COUNTERPARTS = {
    "torch_native": "sglang_vlkv.attention.torch_native.RaggedTorchNativeBackend",
}
