"""Seconds of a call, by the device's own clock."""

import time

import torch


def seconds_of(run, device):
    """The median; on a CPU (a dry run) of one call, which means nothing."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(run, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def graphed(run):
    """The call as a CUDA graph, without the launches' cost to the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def best_of(run, device):
    """The faster of the call as it is and compiled, and which it is."""
    if device != "cuda":
        return run, "eager"
    torch._dynamo.reset()  # sizes of an earlier block would make those of this one dynamic, and slower
    faster = torch.compile(run, dynamic=False)
    try:
        faster()
        times = [seconds_of(call, device) for call in (run, faster)]
    except Exception as error:  # a machine without a host compiler cannot
        print(f"dense is not compiled: {type(error).__name__}", flush=True)
        return run, "eager"
    return (faster, "compiled") if times[1] < times[0] else (run, "eager")
