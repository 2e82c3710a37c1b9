"""Does a configuration fit a slice, and what could it do at best: found out without the slice.

The programs that train and sample are compiled for the slice in processes of their own (libtpu
ahead of time for a TPU, the host platform for GPUs and CPUs) up to the point where their memory is
assigned. Nothing runs: a plan proves that the programs compile, how they are sharded and how much
memory they use; it proves nothing about speed or numerics. Training code imports nothing from here.
"""
