import com.sun.management.OperatingSystemMXBean;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.PrintStream;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.internals.RecordHeader;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * Kafka's own Java producer as a side, with what cloop.c takes: messages that lie ready in memory.
 *
 * <pre>JavaSide DATA BOOTSTRAP TOPIC BATCH WINDOW FORM [key=value ...]</pre>
 *
 * FORM "send": one producer that lives as long as the process; each acknowledgement is counted in a callback.
 * "performance": each turn is a run of Kafka's ProducerPerformance (org.apache.kafka.tools) with the bodies alone: it
 * knows neither keys nor headers, and makes and closes a producer of its own.
 */
public final class JavaSide {
    private record Message(byte[] key, byte[] value, List<Header> headers) {}

    private static final AtomicLong acknowledged = new AtomicLong();
    private static final AtomicReference<Exception> failure = new AtomicReference<>();
    private static final PrintStream answers = System.out;

    private static byte[] span(ByteBuffer data) {
        byte[] bytes = new byte[data.getInt()];
        data.get(bytes);
        return bytes;
    }

    /** The file that benchmarks/data.py writes. */
    private static List<Message> load(Path path) throws IOException {
        ByteBuffer data = ByteBuffer.wrap(Files.readAllBytes(path)).order(ByteOrder.nativeOrder());
        data.position(4);
        int count = data.getInt();
        int headerCount = data.getInt();
        List<Message> messages = new ArrayList<>(count);
        for (int i = 0; i < count; i++) {
            byte[] key = span(data);
            byte[] value = span(data);
            List<Header> headers = new ArrayList<>(headerCount);
            for (int h = 0; h < headerCount; h++) {
                headers.add(new RecordHeader(new String(span(data), StandardCharsets.UTF_8), span(data)));
            }
            messages.add(new Message(key.length == 0 ? null : key, value, headers));
        }
        return messages;
    }

    private static long kilobytes(String name) throws IOException {
        for (String line : Files.readAllLines(Path.of("/proc/self/status"))) {
            if (line.startsWith(name + ":")) {
                return Long.parseLong(line.replaceAll("\\D", ""));
            }
        }
        return 0;
    }

    private static void await(long enqueued, long most) throws InterruptedException {
        synchronized (acknowledged) {
            while (enqueued - acknowledged.get() > most && failure.get() == null) {
                acknowledged.wait(1000);
            }
        }
        if (failure.get() != null) {
            throw new IllegalStateException(failure.get());
        }
    }

    private static KafkaProducer<byte[], byte[]> producer;
    private static List<Message> messages;
    private static long enqueued;
    private static int next;

    private static void send(String topic, long count, int batch, long window) throws InterruptedException {
        for (long sent = 0; sent < count; sent += batch) {
            for (int i = 0; i < batch; i++) {
                Message m = messages.get(next);
                next = (next + 1) % messages.size();
                producer.send(new ProducerRecord<>(topic, null, null, m.key, m.value, m.headers), (metadata, error) -> {
                    if (error != null) {
                        failure.compareAndSet(null, error);
                    }
                    if (acknowledged.incrementAndGet() % 128 == 0 || error != null) {
                        synchronized (acknowledged) {
                            acknowledged.notify();
                        }
                    }
                });
                enqueued++;
                if (window > 0 && enqueued % 128 == 0) {
                    await(enqueued, window);
                }
            }
            if (window == 0) {
                producer.flush();
                await(enqueued, 0);
            }
        }
        producer.flush();
        await(enqueued, 0);
    }

    private static void perform(String topic, long count, Path bodies, Properties config) throws Exception {
        List<String> arguments = new ArrayList<>(List.of(
                "--topic", topic, "--num-records", Long.toString(count), "--throughput", "-1",
                "--payload-file", bodies.toString(), "--command-property"));
        config.forEach((key, value) -> {
            if (!key.toString().endsWith("serializer")) {
                arguments.add(key + "=" + value);
            }
        });
        Class.forName("org.apache.kafka.tools.ProducerPerformance")
                .getMethod("main", String[].class)
                .invoke(null, (Object) arguments.toArray(new String[0]));
    }

    public static void main(String[] arguments) throws Exception {
        System.setOut(new PrintStream(OutputStream.nullOutputStream())); // what others print is no answer
        String topic = arguments[2];
        int batch = Integer.parseInt(arguments[3]);
        long window = Long.parseLong(arguments[4]);
        boolean performs = arguments[5].equals("performance");
        messages = load(Path.of(arguments[0]));

        Properties config = new Properties();
        config.put("bootstrap.servers", arguments[1]);
        config.put("acks", "all");
        config.put("enable.idempotence", "true");
        config.put("key.serializer", ByteArraySerializer.class.getName());
        config.put("value.serializer", ByteArraySerializer.class.getName());
        for (int i = 6; i < arguments.length; i++) {
            String[] pair = arguments[i].split("=", 2);
            config.put(pair[0], pair[1]);
        }
        Path bodies = null;
        if (performs) {
            bodies = Files.createTempFile("bodies", ".txt");
            List<String> lines = new ArrayList<>();
            for (Message m : messages) {
                lines.add(new String(m.value, StandardCharsets.UTF_8));
            }
            Files.write(bodies, lines);
        } else {
            producer = new KafkaProducer<>(config);
        }

        OperatingSystemMXBean system = (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
        answers.printf("{\"ready\": \"Java\", \"resident\": %d}%n", kilobytes("VmRSS") * 1024);
        BufferedReader orders = new BufferedReader(new InputStreamReader(System.in));
        for (String line = orders.readLine(); line != null; line = orders.readLine()) {
            long count = Long.parseLong(line.split(" ")[0]);
            long before = acknowledged.get();
            long resident = kilobytes("VmRSS") * 1024;
            long cpu = system.getProcessCpuTime();
            long start = System.nanoTime();
            if (performs) {
                perform(topic, count, bodies, config); // that all were delivered shows in the broker's high watermarks
                acknowledged.addAndGet(count);
            } else {
                send(topic, count, batch, window);
            }
            double seconds = (System.nanoTime() - start) / 1e9;
            double used = (system.getProcessCpuTime() - cpu) / 1e9;
            answers.printf(
                    "{\"messages\": %d, \"acknowledged\": %d, \"seconds\": %.9f, \"cpu_user\": %.6f, \"cpu_system\": 0.0, "
                            + "\"cpu_thread\": 0.0, \"rss_start\": %d, \"rss_end\": %d, \"rss_peak\": %d}%n",
                    count, acknowledged.get() - before, seconds, used,
                    resident, kilobytes("VmRSS") * 1024, kilobytes("VmHWM") * 1024);
        }
        answers.println("{\"closed\": true}");
        if (producer != null) {
            producer.close();
        } else {
            Files.delete(bodies);
        }
    }
}
