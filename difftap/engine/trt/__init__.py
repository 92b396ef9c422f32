"""What TensorRT and TensorRT for RTX share: building a plan from a graph, and running a plan on the GPU.

The modules ``tensorrt`` and ``tensorrt_rtx`` have the same API. Their differences are in the two files of
`difftap.engine.backends`. Types are named after ``tensorrt``'s.
"""
