"""The public interface: Avro schemas, topics, framings, and what other programs must be able to reproduce."""
