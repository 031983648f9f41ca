"""Whatever strangers may send: mutated requests and abused connections, against the server as its command starts it."""
