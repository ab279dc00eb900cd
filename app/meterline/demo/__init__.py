"""The demo: real usage through the whole pipeline, trouble on the way, every credit accounted for."""
