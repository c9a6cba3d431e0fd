"""`etap bench`: a workload as a series of decode steps, timed with ETAP and with every peer that can be imported.

    traces, workload    what is asked for: requests from a trace or drawn from a workload file
    scheduler           requests to decode steps, as a continuous-batching server would run them
    inputs              the tensors of a step
    contenders, peers   what is timed: the stream ceiling, etap, the other kernels
    timing, measure     how: interleaved rounds over rotated KV, every result against a float64 reference
    measurement         what comes of it
    results, runner     the JSON file, written after every step, and the loop that fills it

inputs, contenders, peers, timing and measure need PyTorch only; scripts/bench_gpu.py, which tables fixed shapes, uses them too.
"""
