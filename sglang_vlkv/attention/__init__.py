"""One ragged counterpart for each SGLang attention backend that can serve a policy."""

# By device: SGLang attention backend -> what serves it while a policy is armed.
COUNTERPARTS = {
    "cpu": {
        "torch_native": "sglang_vlkv.attention.torch_native.RaggedTorchNativeBackend",
    },
    "cuda": {
        "fa3": "sglang_vlkv.attention.flashattention.RaggedFlashAttentionBackend",
        "flashinfer": "sglang_vlkv.attention.flashinfer.RaggedFlashInferBackend",
        "triton": "sglang_vlkv.attention.triton.RaggedTritonBackend",
    },
}
