import torch

# A second thread does not speed up tiny networks, and makes them ten times slower when test workers share the cores.
torch.set_num_threads(1)
