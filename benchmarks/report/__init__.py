"""The results page: tables and plots of records that `extemb eval` wrote; run as `python -m benchmarks.report`."""
