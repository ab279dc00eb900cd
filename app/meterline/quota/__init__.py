"""Credit buckets: no work starts without credits."""
