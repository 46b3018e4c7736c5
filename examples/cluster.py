#!/usr/bin/env python3
"""Count what matches in many captures on a Dask cluster, one file a task.

    cluster.py 'tcp and dst port 7070' trace1.pcap trace2.pcap.gz --scheduler tcp://10.0.0.1:8786

Without --scheduler a cluster of processes is started on this machine. The files must be there under the same names
where the tasks run, as must kbpf. Anything that behaves like an executor of concurrent.futures will do in its place.
Needs `distributed`: pip install distributed.
"""

import argparse

import kbpf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expression")
    parser.add_argument("captures", nargs="+")
    parser.add_argument("--scheduler", help="address of a running cluster's scheduler")
    parser.add_argument("--workers", type=int, default=2, help="processes to start where there is no scheduler")
    options = parser.parse_args()

    from distributed import Client

    local = {"n_workers": options.workers, "threads_per_worker": 1, "dashboard_address": None}
    with Client(options.scheduler, **({} if options.scheduler else local)) as client:
        result = kbpf.run_capture(options.expression, options.captures, executor=client.get_executor())
    print(f"{result.matched} of {result.packets} packets match")


if __name__ == "__main__":
    main()
