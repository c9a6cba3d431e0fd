"""What MLA decode takes on a card, measured, explained and compared: the commands `etap bench`, `report`, `history`, `model` and `tune`.

    shape, shape_lists              the shape of a call; lists of them, and sweeps
    traces, workload, scheduler     requests, and the decode steps that a server with continuous batching makes of them
    work                            what is to be measured: the steps of a workload, or shapes
    inputs, contenders, peers       the tensors of a shape, and what is timed: the ceiling, ETAP, other kernels
    timing, measure, measurement    interleaved rounds over rotated KV, every result against float64, and what comes of it
    runner, results                 the loop, and the one format of results, written after every row
    table, compare, history         results beside each other
    model/, report/, commands/      the model of the card; the HTML page; the command line

Only inputs, contenders, peers, timing, measure and runner need PyTorch and libetap: results are read anywhere.
"""
