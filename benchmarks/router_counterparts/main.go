// The two ends of bench_router.py: `stub` answers as an OpenAI-compatible server at no cost to speak
// of, `load` asks one, directly or through a router, with so many clients at once.
package main

import (
	"flag"
	"os"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	model := flags.String("model", "stub", "its name")
	url := flags.String("url", "", "up to and with /v1")
	clients := flags.Int("clients", 1, "at once; each asks again when it is answered")
	seconds := flags.Float64("seconds", 1, "how long each asks again")
	once := flags.Bool("once", false, "each asks once, and all that is taken is timed")
	stream := flags.Bool("stream", false, "streamed answers")
	chunks := flags.Int("chunks", 1, "in each answer")
	delay := flags.Int("delay-ms", 0, "between two chunks")
	ramp := flags.Float64("ramp", 0, "seconds over which the clients begin")
	flags.Parse(os.Args[2:])
	if os.Args[1] == "stub" {
		stub(*model)
		return
	}
	load(plan{
		url: *url, model: *model, clients: *clients, seconds: *seconds, once: *once,
		stream: *stream, ramp: *ramp,
		wanted: wanted{*chunks, time.Duration(*delay) * time.Millisecond},
	})
}
