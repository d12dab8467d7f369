"""One ragged counterpart for each SGLang attention backend that can serve a policy."""
