"""Faust made fit for money: chunk delivery, fenced transactions, resume from committed state.

The only package that touches private parts of Faust and aiokafka. Everything else sees `owner` (the port) and
`app.build_app`.
"""
