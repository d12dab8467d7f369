"""What of SGLang our own classes stand in for while a policy is armed: names, and nothing else."""

RADIX_CACHE = "vlkv"  # of --radix-cache-backend

# Attention, by device: SGLang attention backend -> what serves it while a policy is armed.
ATTENTION = {
    "cpu": {
        "torch_native": "sglang_vlkv.attention.torch_native.RaggedTorchNativeBackend",
    },
    "cuda": {
        "fa3": "sglang_vlkv.attention.flashattention.RaggedFlashAttentionBackend",
        "flashinfer": "sglang_vlkv.attention.flashinfer.RaggedFlashInferBackend",
        "triton": "sglang_vlkv.attention.triton.RaggedTritonBackend",
    },
}

# The arguments that name one; those of a phase go before the first.
BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

# What SGLang also takes for plain attention on some NVIDIA GPUs, where any of ours does as well.
OTHERS_OF_HARDWARE = ("fa4", "trtllm_mha")

# Sizes of a head that a counterpart's kernels are compiled for; the others take any.
HEAD_DIMS = {"flashinfer": (64, 128, 256)}


def takes(backend: str | None, head_dim: int) -> bool:
    """Whether what serves ``backend`` has kernels for heads of this size."""
    return head_dim in HEAD_DIMS.get(backend, (head_dim,))
