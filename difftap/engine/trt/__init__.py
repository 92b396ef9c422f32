"""What the two TensorRTs share: building a plan from a graph, and running one on the GPU.

``tensorrt`` (data centre) and ``tensorrt_rtx`` are one API under two module names; what differs is in the two files in
`difftap.engine.backends`.
"""
