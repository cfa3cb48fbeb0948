"""Triton kernels of the selection paths. Imported lazily, by a path's ``run``: nothing here may load without Triton
except ``support``, which says where these kernels can run."""
