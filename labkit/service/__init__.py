"""The service: an OpenAI-compatible HTTP API in front of an engine, or of vLLM.

``labkit serve`` runs it (`labkit.service.serve`), `labkit.client.launch` starts and stops it, `labkit.client` talks to it.
"""
