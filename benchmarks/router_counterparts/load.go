package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"sort"
	"sync"
	"time"
)

type plan struct {
	url, model string
	clients    int
	seconds    float64
	once       bool
	stream     bool
	ramp       float64
	wanted     wanted
}

// What one client saw.
type seen struct {
	taken  []float64 // ms, of each whole answer
	chunks int
	errors int
	first  string // error
}

type found struct {
	Count   int     `json:"count"`
	Errors  int     `json:"errors"`
	Error   string  `json:"first_error"`
	Chunks  int     `json:"chunks"`
	Seconds float64 `json:"seconds"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
}

func load(plan plan) {
	client := &http.Client{Transport: &http.Transport{
		MaxIdleConns: plan.clients, MaxIdleConnsPerHost: plan.clients, DisableCompression: true,
	}}
	body, _ := json.Marshal(map[string]any{
		"model": plan.model, "stream": plan.stream,
		"messages": []map[string]string{{"role": "user", "content": plan.wanted.String()}},
	})
	begun := time.Now()
	until := begun.Add(time.Duration(plan.seconds * float64(time.Second)))
	all := make([]seen, plan.clients)
	var waiting sync.WaitGroup
	for i := range all {
		waiting.Add(1)
		go func(number int) {
			defer waiting.Done()
			time.Sleep(time.Duration(plan.ramp * float64(number) / float64(plan.clients) * float64(time.Second)))
			for {
				at := time.Now()
				chunks, err := ask(client, plan, body)
				all[number].chunks += chunks
				if err != nil {
					all[number].errors++
					all[number].first = err.Error()
					time.Sleep(10 * time.Millisecond)
				} else {
					all[number].taken = append(all[number].taken, time.Since(at).Seconds()*1000)
				}
				if plan.once || time.Now().After(until) {
					return
				}
			}
		}(i)
	}
	waiting.Wait()
	result := found{Seconds: time.Since(begun).Seconds()}
	var taken []float64
	for _, each := range all {
		taken = append(taken, each.taken...)
		result.Chunks += each.chunks
		result.Errors += each.errors
		if each.first != "" {
			result.Error = each.first
		}
	}
	sort.Float64s(taken)
	result.Count = len(taken)
	if len(taken) > 0 {
		result.P50, result.P99 = taken[len(taken)/2], taken[len(taken)*99/100]
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

// ask returns how many pieces of text came. An answer that lacks one, or its end, is an error.
func ask(client *http.Client, plan plan, body []byte) (int, error) {
	response, err := client.Post(plan.url+"/chat/completions", "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 200))
		return 0, fmt.Errorf("%s: %s", response.Status, text)
	}
	if !plan.stream {
		whole, err := io.ReadAll(response.Body)
		if count := bytes.Count(whole, []byte(word)); err == nil && count != plan.wanted.chunks {
			return count, fmt.Errorf("%d words of %d", count, plan.wanted.chunks)
		}
		return plan.wanted.chunks, err
	}
	count, done := 0, false
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(make([]byte, 4096), 1<<20)
	for lines.Scan() {
		if bytes.Contains(lines.Bytes(), []byte(word)) {
			count++
		}
		done = done || bytes.Equal(lines.Bytes(), []byte("data: [DONE]"))
	}
	if err := lines.Err(); err != nil {
		return count, err
	}
	if !done || count != plan.wanted.chunks {
		return count, fmt.Errorf("%d chunks of %d, ended: %v", count, plan.wanted.chunks, done)
	}
	return count, nil
}
