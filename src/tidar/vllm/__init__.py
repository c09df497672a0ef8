"""TiDAR inside vLLM: a plug-in that serves a converted checkpoint with one fused draft-and-verify forward a step.

vLLM keeps everything that it is good at (batching, paged KV cache, prefix caching, tensor parallelism, the HTTP
server); the plug-in says which tokens a step holds, what they see, and which of them stand. Importing this package
needs no vLLM.
"""

from tidar.vllm.command import Options, arguments, command, engine_options, environment

__all__ = ["Options", "arguments", "command", "engine_options", "environment"]
