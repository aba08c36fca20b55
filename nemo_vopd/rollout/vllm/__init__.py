"""vLLM as the rollout engine: servers, requests and weight sync."""
