"""Clients of servers: vLLM for rollouts and for a teacher's hidden states, any OpenAI-compatible one for responses."""
