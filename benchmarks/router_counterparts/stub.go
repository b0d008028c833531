package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"strings"
	"time"
)

// How an answer is to be is said in the last message, because that reaches the stub through any
// router unchanged: "chunks=20 delay_ms=100".
type wanted struct {
	chunks int
	delay  time.Duration
}

func (w wanted) String() string {
	return fmt.Sprintf("chunks=%d delay_ms=%d", w.chunks, w.delay.Milliseconds())
}

func parsed(text string) wanted {
	chunks, delay := 1, 0
	fmt.Sscanf(text, "chunks=%d delay_ms=%d", &chunks, &delay)
	return wanted{chunks, time.Duration(delay) * time.Millisecond}
}

type request struct {
	Model    string `json:"model"`
	Stream   bool   `json:"stream"`
	Messages []struct {
		Content json.RawMessage `json:"content"`
	} `json:"messages"`
	StreamOptions *struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
}

// text of the last message, which may be a string or parts.
func (r request) text() string {
	if len(r.Messages) == 0 {
		return ""
	}
	raw := r.Messages[len(r.Messages)-1].Content
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text
	}
	var parts []struct {
		Text string `json:"text"`
	}
	json.Unmarshal(raw, &parts)
	for _, part := range parts {
		text += part.Text
	}
	return text
}

// Each chunk has another number: LiteLLM takes a hundred alike for an engine that runs in circles.
const word = "word"

func chunk(model, delta, reason string) string {
	return fmt.Sprintf(`data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,`+
		`"model":%q,"choices":[{"index":0,"delta":%s,"finish_reason":%s}]}`+"\n\n", model, delta, reason)
}

func chat(out http.ResponseWriter, in *http.Request) {
	var asked request
	if err := json.NewDecoder(in.Body).Decode(&asked); err != nil {
		http.Error(out, err.Error(), http.StatusBadRequest)
		return
	}
	want := parsed(asked.text())
	usage := fmt.Sprintf(`{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":%d}`, want.chunks, 8+want.chunks)
	if !asked.Stream {
		time.Sleep(time.Duration(want.chunks) * want.delay)
		out.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(out, `{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":%q,`+
			`"choices":[{"index":0,"message":{"role":"assistant","content":%q},"finish_reason":"stop"}],"usage":%s}`,
			asked.Model, strings.Repeat(word, want.chunks), usage)
		return
	}
	out.Header().Set("Content-Type", "text/event-stream")
	flusher := out.(http.Flusher)
	say := func(text string) bool {
		_, err := out.Write([]byte(text))
		flusher.Flush() // a write of its own for each, as an engine's
		return err == nil && in.Context().Err() == nil
	}
	next := time.Now()
	for i := 0; i < want.chunks; i++ {
		if want.delay > 0 {
			next = next.Add(want.delay)
			time.Sleep(time.Until(next))
		}
		delta := fmt.Sprintf(`{"content":"%s%d "}`, word, i)
		if i == 0 {
			delta = fmt.Sprintf(`{"role":"assistant","content":"%s%d "}`, word, i)
		}
		if !say(chunk(asked.Model, delta, "null")) {
			return
		}
	}
	end := chunk(asked.Model, "{}", `"stop"`)
	if asked.StreamOptions != nil && asked.StreamOptions.IncludeUsage {
		end += fmt.Sprintf(`data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,`+
			`"model":%q,"choices":[],"usage":%s}`+"\n\n", asked.Model, usage)
	}
	say(end + "data: [DONE]\n\n")
}

func stub(model string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf(`{"port":%d}`+"\n", listener.Addr().(*net.TCPAddr).Port)
	http.HandleFunc("/v1/chat/completions", chat)
	http.HandleFunc("/v1/models", func(out http.ResponseWriter, _ *http.Request) {
		out.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(out, `{"object":"list","data":[{"id":%q,"object":"model","created":1700000000,"owned_by":"stub"}]}`, model)
	})
	http.HandleFunc("/health", func(out http.ResponseWriter, _ *http.Request) {})
	log.Fatal(http.Serve(listener, nil))
}
