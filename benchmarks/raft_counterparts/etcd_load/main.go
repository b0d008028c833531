// etcd_load puts load on an etcd cluster: so many writers, each with one put after the other, sent to
// the leader. Prints one line of JSON: how many, in how many seconds, p50 and p99 in milliseconds.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	endpoints := flag.String("endpoints", "127.0.0.1:2379", "with commas between")
	inFlight := flag.Int("in-flight", 1, "requests at once")
	connections := flag.Int("connections", 1, "that they share")
	seconds := flag.Float64("seconds", 5, "for how long")
	size := flag.Int("bytes", 256, "of key and value together")
	reads := flag.Bool("reads", false, "linearizable reads instead of puts")
	flag.Parse()

	leader := leaderOf(strings.Split(*endpoints, ","))
	clients := make([]*clientv3.Client, *connections)
	for i := range clients {
		clients[i] = connect(leader)
	}
	value := strings.Repeat("v", *size-len(key(0)))
	ctx := context.Background()
	if _, err := clients[0].Put(ctx, key(0), value); err != nil {
		log.Fatal(err)
	}
	begun := time.Now()
	until := begun.Add(time.Duration(*seconds * float64(time.Second)))
	taken := make([][]time.Duration, *inFlight)
	var workers sync.WaitGroup
	for i := range taken {
		workers.Add(1)
		go func() {
			defer workers.Done()
			client, own := clients[i%len(clients)], key(i)
			for now := time.Now(); now.Before(until); {
				var err error
				if *reads {
					_, err = client.Get(ctx, key(0))
				} else {
					_, err = client.Put(ctx, own, value)
				}
				if err != nil {
					log.Fatal(err)
				}
				after := time.Now()
				taken[i] = append(taken[i], after.Sub(now))
				now = after
			}
		}()
	}
	workers.Wait()
	elapsed := time.Since(begun).Seconds()
	all := slices.Concat(taken...)
	slices.Sort(all)
	at := func(share float64) float64 {
		return float64(all[int(share*float64(len(all)-1))].Microseconds()) / 1000
	}
	json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"count": float64(len(all)), "seconds": elapsed, "p50_ms": at(0.5), "p99_ms": at(0.99),
	})
}

func key(i int) string { return fmt.Sprintf("key%09d", i) }

func connect(endpoint string) *clientv3.Client {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	return client
}

// leaderOf asks each, for ten seconds, until one says that it leads.
func leaderOf(endpoints []string) string {
	for until := time.Now().Add(10 * time.Second); time.Now().Before(until); {
		for _, endpoint := range endpoints {
			client := connect(endpoint)
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			status, err := client.Status(ctx, endpoint)
			cancel()
			client.Close()
			if err == nil && status.Leader != 0 && status.Leader == status.Header.MemberId {
				return endpoint
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	log.Fatal("no etcd leads")
	return ""
}
