"""Policy → kernel: what a policy becomes, as an eBPF program and as rules. Nothing here knows torch or the guard."""
