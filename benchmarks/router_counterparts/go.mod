module router_counterparts

go 1.21
