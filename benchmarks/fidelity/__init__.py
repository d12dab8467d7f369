"""What a KV-cache policy costs in answers: the same questions under every policy and budget."""
