"""What the gateway counts."""

from __future__ import annotations

from cortex_common.telemetry.metrics import counter, gauge, histogram

REQUESTS = counter("cortex_gateway_requests_total", "HTTP requests answered.", ("method", "route", "status"))
SECONDS = histogram("cortex_gateway_request_seconds", "Time until an answer began.", ("method", "route"))
SENT = counter("cortex_gateway_sent_bytes_total", "Bytes of answers' bodies.", ("route",))
EVENT_STREAMS = gauge("cortex_gateway_event_streams", "Event streams open now.")
THROTTLED = counter("cortex_gateway_throttled_total", "Requests refused for coming too often.", ("what",))
NODES = gauge("cortex_gateway_nodes", "Connections of nodes, by whether they attend or only transfer.", ("attends",))
NODE_BYTES = counter("cortex_gateway_node_bytes_total", "Bytes over WebSocket.", ("direction", "kind"))
NODE_CLOSES = counter("cortex_gateway_node_closes_total", "Connections of nodes that ended, by close code.", ("code",))
SLOW = counter("cortex_gateway_slow_connections_total", "Connections given up as too slow.", ("waited_for",))
PEER_UP = gauge("cortex_gateway_peer_up", "Whether the peer answered the last probe.", ("peer",))
